"""Saves a small LLaMA with random weights and its tokenizer in the transformers format, for docs/continue.md.

    python scripts/tiny_llama.py --text='texts/*.txt' --output=DIR

4 layers of 128, 8 heads, 2 key-value heads, tied embeddings, llama3 RoPE, 2,048 byte-level tokens, and a BOS
before each text. Needs the extra `hf-test`.
"""

import glob
import sys
from pathlib import Path

from relora_jax import cli
from relora_jax.errors import UserError

PIECES = 2048
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def main(argv: list[str]) -> int:
    """Writes the model and its tokenizer; returns the exit code."""
    flags = cli.options(argv, text="", output="")
    pattern = flags["text"]  # or a path, which may have brackets
    texts = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    if not texts or not flags["output"]:
        raise UserError(
            f"--text={flags['text']} matches no file or --output is missing: pass both, see --help"
        )
    save_model(Path(flags["output"]))
    save_tokenizer(Path(flags["output"]), texts)
    print(flags["output"])
    return 0


def save_model(folder: Path) -> None:
    """Saves a model with random float32 weights from a fixed seed."""
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
    """Trains and saves a byte-level BPE tokenizer like LLaMA 3's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast  # pyright: ignore[reportMissingImports]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    fast.save_pretrained(folder)


if __name__ == "__main__":
    cli.main(main, __doc__, sys.argv)
