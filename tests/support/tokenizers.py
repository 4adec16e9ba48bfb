"""Tokenizers of toy size: SentencePiece models, tokenizer.json files."""

import io
import json

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from relora_jax.hf import sentencepiece_json
from relora_jax.hf.sentencepiece_json import parse
from relora_jax.storage import places
from relora_jax.tokenizer import tokenizer
from tests.support.documents import texts

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>"]


def json_file(folder, *, kind="bpe", special=SPECIAL, name="tokenizer.json", **beside):
    """A byte-level BPE or a unigram model with all that a file may ask for; `beside` it NAME.json."""
    if kind == "bpe":
        made = tokenizers.Tokenizer(
            models.BPE(unk_token="<unk>" if "<unk>" in special else None, dropout=0.5)
        )
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        made = tokenizers.Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=99, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    made.train_from_iterator([*texts(40), "</s> <pad> Number"], trainer)
    made.add_tokens(["zebra"])
    if "</s>" in special:
        ends = {token: made.token_to_id(token) for token in ("<s>", "</s>")}
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[*ends.items()]
        )
    made.enable_truncation(5)
    made.enable_padding(length=7)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    made.save(str(path))
    for other, facts in beside.items():
        (folder / f"{other}.json").write_text(json.dumps(facts))
    return path


LINES = [line for text in texts(60) for line in text.split("\n\n")]


CODE = [f"if x[{i}]  == '<0x{i:02X}>': </p>\t--- 000{i} aaaa abab é 日本" for i in range(300)] + LINES


KEEP = {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "byte_fallback": True}


OWN = {**tokenizer._SETTINGS, "vocab_size": 420}


IDENTITY = {"normalization_rule_name": "identity"}


LLAMA = {**KEEP, **IDENTITY, "unk_id": 0, "bos_id": 1, "eos_id": 2, "vocab_size": 500}


SYMBOLS = ["<sep>", "\n", "\n\n", "\u2581\u2581", "\u2581\u2581\u2581", "a b", "</p>", "\t"]


GEMMA = {**LLAMA, "add_dummy_prefix": False, "user_defined_symbols": SYMBOLS, "split_by_whitespace": False}


def trained(lines, *, kind, **settings):
    written = io.BytesIO()
    settings = {"minloglevel": 2, "hard_vocab_limit": kind == "bpe", **settings, "model_type": kind}
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
        sentence_iterator=iter(lines), model_writer=written, **settings
    )
    return parse(written.getvalue())


def tied(path, *pieces):
    """A BPE model of letters and these pieces, which have one score."""
    model = sentencepiece_json.parse(b"")
    model.trainer_spec.model_type = sentencepiece_json.BPE
    rule = model.normalizer_spec
    rule.add_dummy_prefix = rule.remove_extra_whitespaces = False
    special = [("<unk>", sentencepiece_json.UNKNOWN), ("</s>", sentencepiece_json.CONTROL)]
    for piece, kind in [*special, *((piece, sentencepiece_json.NORMAL) for piece in pieces + tuple("abcd"))]:
        model.pieces.add(piece=piece, type=kind, score=-1 if len(piece) > 1 else -9)
    path.write_bytes(model.SerializeToString())
    return tokenizer.load(path)


T5_PATH = places.cache_dir() / "tokenizers/t5.model"  # before a test moves the cache
