"""Toy tokenizers: SentencePiece models and tokenizer.json files."""

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


def json_file(folder, *, kind="bpe", special=SPECIAL, name="tokenizer.json", **sidecars):
    """A byte-level BPE or unigram model with all optional settings, and `sidecars` NAME.json next to it."""
    if kind == "bpe":
        model = tokenizers.Tokenizer(
            models.BPE(unk_token="<unk>" if "<unk>" in special else None, dropout=0.5)
        )
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        model = tokenizers.Tokenizer(models.Unigram())
        model.normalizer = normalizers.NFKC()
        model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=99, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    model.train_from_iterator([*texts(40), "</s> <pad> Number"], trainer)
    model.add_tokens(["zebra"])
    if "</s>" in special:
        ends = {token: model.token_to_id(token) for token in ("<s>", "</s>")}
        model.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[*ends.items()]
        )
    model.enable_truncation(5)
    model.enable_padding(length=7)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    model.save(str(path))
    for sidecar, settings in sidecars.items():
        (folder / f"{sidecar}.json").write_text(json.dumps(settings))
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
    model = io.BytesIO()
    settings = {"minloglevel": 2, "hard_vocab_limit": kind == "bpe", **settings, "model_type": kind}
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
        sentence_iterator=iter(lines), model_writer=model, **settings
    )
    return parse(model.getvalue())


def tied(path, *pieces):
    """A BPE model of letters and these pieces, which share one score."""
    model = sentencepiece_json.parse(b"")
    model.trainer_spec.model_type = sentencepiece_json.BPE
    rule = model.normalizer_spec
    rule.add_dummy_prefix = rule.remove_extra_whitespaces = False
    special = [("<unk>", sentencepiece_json.UNKNOWN), ("</s>", sentencepiece_json.CONTROL)]
    for piece, kind in [*special, *((piece, sentencepiece_json.NORMAL) for piece in pieces + tuple("abcd"))]:
        model.pieces.add(piece=piece, type=kind, score=-1 if len(piece) > 1 else -9)
    path.write_bytes(model.SerializeToString())
    return tokenizer.load(path)


T5_PATH = places.cache_dir() / "tokenizers/t5.model"  # read before tests redirect the cache
