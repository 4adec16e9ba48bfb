"""A small LLaMA with random weights and a tokenizer of its own, as transformers writes one: docs/continue.md.

    python scripts/tiny_llama.py --text='texts/*.txt' --output=DIR

4 layers of 128, 8 heads on 2 key-value heads, tied embeddings, llama3 rope, 2,048 byte-level pieces with a
bos before each text. Needs the extra `hf-test`.
"""

import glob
import sys
from pathlib import Path

from relora_jax import cli
from relora_jax.errors import UserError

PIECES = 2048
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def main(argv: list[str]) -> int:
    """Writes the model and its tokenizer; the exit code."""
    words = cli.options(argv, text="", output="")
    texts = sorted(glob.glob(words["text"], recursive=True))
    if not texts or not words["output"]:
        raise UserError(f"--text={words['text']} names no file: --text='texts/*.txt' --output=DIR")
    save_model(Path(words["output"]))
    save_tokenizer(Path(words["output"]), texts)
    print(words["output"])
    return 0


def save_model(folder: Path) -> None:
    """Random weights from a fixed seed, in float32."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        vocab_size=PIECES,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={**rope, "rope_theta": 500_000.0, "original_max_position_embeddings": 256},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def save_tokenizer(folder: Path, texts: list[str]) -> None:
    """Byte-level BPE like LLaMA 3's, trained on the files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast  # pyright: ignore[reportMissingImports]

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train(texts, trainer)
    made.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token=BOS, eos_token=EOS).save_pretrained(folder)


if __name__ == "__main__":
    cli.main(main, __doc__, sys.argv)
