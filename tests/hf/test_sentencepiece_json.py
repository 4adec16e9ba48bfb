"""A SentencePiece model and the `tokenizers` tokenizer converted from it give the same ids."""

import sys
import time

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_jax.hf import probes, sentencepiece_json
from relora_jax.hf.sentencepiece_json import CONTROL, NORMAL, SPACE, SYMBOL, UNUSED, parse
from tests.support.documents import hard_documents
from tests.support.tokenizers import CODE, GEMMA, IDENTITY, KEEP, LINES, LLAMA, OWN, SYMBOLS, trained
from tests.support.tokenizers import T5_PATH as T5

PLAIN = {**IDENTITY, "vocab_size": 160, "control_symbols": ["[PAD]", "<name>"]}
DEFAULT = {"vocab_size": 160, "character_coverage": 0.98}
MODELS = {
    "own": (LINES, OWN),
    "llama": (CODE, LLAMA),
    "symbols": (CODE, GEMMA),
    "symbols and prefix": (CODE, {**GEMMA, "add_dummy_prefix": True}),
    "plain": (CODE, PLAIN),
    "without prefix": (LINES, {**PLAIN, "add_dummy_prefix": False, "vocab_size": 70}),
}
RULES = {
    "default": (CODE, DEFAULT),
    "spaces kept": (CODE, {**DEFAULT, **KEEP, "vocab_size": 500}),
    "nfkc": (LINES, {"normalization_rule_name": "nfkc", "add_dummy_prefix": False, "vocab_size": 60}),
}


def check(model, most=0):
    """The number of documents with other ids; apart from ties at most `most`."""
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    ours = sentencepiece_json.convert(model)
    ours.encode_special_tokens = True
    documents = hard_documents([piece.piece.replace(SPACE, " ") for piece in model.pieces])
    ids = [encoding.ids for encoding in ours.encode_batch(documents)]
    other = [
        (text, one, two)
        for text, one, two in zip(documents, theirs.encode(documents), ids, strict=True)
        if one != two
    ]
    odd = [each for each in other if not sentencepiece_json.is_tie(model, *each[1:])]
    assert len(odd) <= most, [(text, *map(theirs.id_to_piece, both)) for text, *both in odd[:3]]
    return len(other)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_are_equal_on_a_thousand_hard_documents(kind, name):
    lines, settings = MODELS[name]
    ties = check(trained(lines, kind=kind, **settings))
    assert ties == 0 if kind == "bpe" else ties < 50


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_under_a_normalization_rule_differ_in_few_hard_documents(kind, name):
    lines, settings = RULES[name]
    assert check(trained(lines, kind=kind, **settings), most=100) < 100  # of a thousand


@pytest.mark.slow
@pytest.mark.skipif(not T5.is_file(), reason=f"{T5} is missing: python scripts/get_t5_tokenizer.py")
@pytest.mark.ci
def test_ids_of_t5_differ_in_few_hard_documents():
    assert check(parse(T5.read_bytes()), most=5) < 30  # of a thousand: its rule, and ties


def test_ties_have_equal_scores():
    model = trained(LINES, kind="unigram", **OWN)
    best = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    one = best.encode("people are free")
    assert sentencepiece_json.is_tie(model, one, one[::-1])
    a, b = (next(iter(best.encode(text))) for text in ("people", "free"))
    assert not sentencepiece_json.is_tie(model, [*one * 99, a], [*one * 99, b])
    assert not sentencepiece_json.is_tie(model, one, [one[0], *one[2:], one[0]])
    assert not sentencepiece_json.is_tie(trained(LINES, kind="bpe", **OWN), one, one[::-1])


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def own(request):
    model = trained(LINES, kind=request.param, **OWN)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    return theirs, sentencepiece_json.convert(model)


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters=SPACE) | st.sampled_from(" \n\te<é")))
def test_decoding_restores_the_text(own, text):
    theirs, ours = own
    ids = ours.encode(text, add_special_tokens=False).ids
    if "<unk>" not in text:  # the id of unk has the text " ⁇ " in SentencePiece, and none in tokenizers
        assert ours.decode(ids) == theirs.decode(ids)
    if not any(name in text for name in ("<pad>", "</s>", "<unk>")):
        assert ours.decode(ids) == text


def test_special_token_in_a_text_is_parsed_unless_disabled(own):
    theirs, ours = own
    eos, text = theirs.piece_to_id("</s>"), "of</s>the"
    assert ours.encode(text).ids == [*theirs.encode("of"), eos, *theirs.encode("the")]
    ours.encode_special_tokens = True
    assert ours.encode(text).ids == theirs.encode(text)
    ours.encode_special_tokens = False
    assert eos not in theirs.encode(text) and ours.decode([eos, *theirs.encode("of")]) == "of"


def test_bos_precedes_each_text_if_set(own):
    model = trained(CODE, kind="bpe", **LLAMA)
    converted = sentencepiece_json.convert(model, bos=1)
    first, second = (converted.encode(text, add_special_tokens=False).ids for text in ("the union", "of"))
    assert converted.encode("the union").ids == [1, *first]
    assert converted.encode("the union", "of").ids == [1, *first, 1, *second]
    assert own[1].encode("of").ids == own[1].encode("of", add_special_tokens=False).ids


def set_type(model):
    piece = next(piece for piece in model.pieces[300:] if piece.type == NORMAL and len(piece.piece) > 2)
    piece.type = UNUSED


def spaces_of_one_score(model):
    """Pieces of spaces alone, last and with the same score, as in LLaMA and Mistral."""
    for n in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11):
        piece = next((piece for piece in model.pieces if piece.piece == SPACE * n), None)
        (piece or model.pieces.add(piece=SPACE * n, type=NORMAL)).score = -1e9
    return model


def test_pieces_of_spaces_with_one_score_keep_their_ids():
    model = spaces_of_one_score(trained(CODE, kind="bpe", **LLAMA))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    documents = ["a" + " " * n + text for n in range(100) for text in ("", "b", "the\n", "\n  ")]
    encodings = sentencepiece_json.convert(model).encode_batch(documents)
    assert [encoding.ids for encoding in encodings] == theirs.encode(documents)
    assert check(model) == 0
    assert {f"a{' ' * n}" for n in range(1, 60)} <= {*probes.texts(model)}


@pytest.mark.parametrize("prefix", [False, True])
def test_symbols_keep_their_ids_next_to_symbols_and_names(prefix):
    model = trained(CODE, kind="bpe", **{**GEMMA, "add_dummy_prefix": prefix})
    names = [piece.piece.replace(SPACE, " ") for piece in model.pieces if piece.type != NORMAL]
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    documents = [f"{one}{name}{two}" for name in names for one in SYMBOLS for two in ("", "<sep>", "<", "a")]
    converted = sentencepiece_json.convert(model)
    converted.encode_special_tokens = True
    assert [encoding.ids for encoding in converted.encode_batch(documents)] == theirs.encode(documents)


def add(piece, kind):
    return lambda model: model.pieces.add(piece=piece, type=kind)


def rule(**settings):
    return lambda model: [setattr(model.normalizer_spec, name, value) for name, value in settings.items()]


def spaced_symbol(model):
    rule(remove_extra_whitespaces=True)(model)
    add("a b", SYMBOL)(model)


def denormalize(model):
    model.denormalizer_spec.precompiled_charsmap = b"a rule"


def suffix(model):
    model.trainer_spec.treat_whitespace_as_suffix = True


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("unigram", suffix, "treat_whitespace_as_suffix or"),
        ("bpe", rule(escape_whitespaces=False), ".*or escape_whitespaces=false is not supported"),
        ("bpe", denormalize, "a denormalization rule is not supported"),
        ("unigram", set_type, "unused piece '.*' is not supported"),
        ("bpe", add("Ωa", NORMAL), "piece 'Ωa' contains a character that is not a piece"),
        ("bpe", add("Ω", CONTROL), "special piece 'Ω' is a single character"),
        ("bpe", rule(remove_extra_whitespaces=True), r"user-defined symbol '\\n' is not supported"),
        ("unigram", spaced_symbol, "a user-defined symbol with a space is not supported"),
    ],
)
def test_unsupported_setting_is_named(kind, change, message):
    model = trained(LINES, kind=kind, **OWN)
    change(model)
    with pytest.raises(ValueError, match=f"^{message}"):
        sentencepiece_json.convert(model)


@pytest.mark.parametrize("kind", ["word", "char"])
def test_other_kinds_of_models_are_refused(kind):
    with pytest.raises(ValueError, match=f"^model_type {kind.upper()} is not supported"):
        sentencepiece_json.convert(trained(LINES, kind=kind, vocab_size=20))


def test_old_protobuf_is_a_one_line_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2", raising=False)
    with pytest.raises(ValueError, match=r"protobuf module cannot be imported: .*: pip install -U protobuf"):
        parse(b"")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_encoding_time_is_not_quadratic(kind):
    converted = sentencepiece_json.convert(trained(CODE, kind=kind, **LLAMA))
    for text in (" ".join(CODE) * 50, "a" * 10**6, "<" * 10**6, " " * 10**6):
        times = []
        for part in (text[: 10**5], text[: 10**6]):
            start = time.perf_counter()
            converted.encode(part)
            times.append(time.perf_counter() - start)
        assert times[1] < 40 * times[0] + 1  # quadratic: 100
