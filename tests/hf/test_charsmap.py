"""What SentencePiece's normalization makes of a text, and what the normalizers made of its rule do."""

import io
import random
import unicodedata

import pytest
import sentencepiece
from tokenizers import normalizers

from relora_jax.hf import charsmap
from relora_jax.hf.sentencepiece_json import SYMBOL, parse
from tests.support.documents import texts

SYMBOLS = ["<<>>"]
CHAINED = "\U0001611e\U0001611f\U00016120\U00016129\U000113c2\U00016d63\U00016d67"  # NFC knows them not yet

LATIN = {unicodedata.normalize("NFD", char): char for char in map(chr, range(0xC0, 0x180))}
SINGLES = {c: new for c in map(chr, range(0x80, 0x3_0000)) if (new := unicodedata.normalize("NFC", c)) != c}
COMPOSED = {key: char for key, char in LATIN.items() if len(key) > 1}


def model(*, symbols=(), **settings):
    """A ModelProto that changes no spaces, and does no more than its rule."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
        sentence_iterator=iter(texts(50)), model_writer=written, vocab_size=40, minloglevel=2, **settings
    )
    made = parse(written.getvalue())
    rule = made.normalizer_spec
    rule.add_dummy_prefix = rule.remove_extra_whitespaces = rule.escape_whitespaces = False
    for symbol in symbols:
        made.pieces.add(piece=symbol, type=SYMBOL)
    return made


def both(made, symbols=()):
    """The rule as SentencePiece has it, and as ours."""
    theirs = sentencepiece.SentencePieceProcessor(model_proto=made.SerializeToString())
    ours = charsmap.as_normalizers(made.normalizer_spec.precompiled_charsmap, symbols)
    return theirs.normalize, normalizers.Sequence(ours).normalize_str  # pyright: ignore


def own_rule(tmp_path, rules):
    """A model whose rule is {sequence: text}."""

    def codes(text):
        return " ".join(f"{ord(char):X}" for char in text)

    path = tmp_path / "rule.tsv"
    path.write_text("".join(f"{codes(key)}\t{codes(text)}\n" for key, text in rules.items()))
    return model(normalization_rule_tsv=str(path))


@pytest.fixture(scope="module")
def nmt():
    """SentencePiece's default rule, and T5's."""
    made = model(normalization_rule_name="nmt_nfkc", symbols=SYMBOLS)
    return charsmap.rules(made.normalizer_spec.precompiled_charsmap), *both(made, SYMBOLS)


def test_rule_read_from_its_bytes_is_sentencepieces(nmt):
    known, theirs, _ = nmt
    rng = random.Random(0)
    characters = [chr(rng.randrange(1, 0xD800)) for _ in range(3000)]
    for text in [*rng.sample(sorted(known), 3000), *characters]:
        if len(text) == 1 or text in known:
            assert theirs(text) == known.get(text, text), ascii(text)
    assert known["\ufb01"] == "fi" and known["か\u3099"] == "が" and known["\u1112\u1161\u11ab"] == "한"


def test_hard_texts_are_rewritten_as_sentencepiece_rewrites_them(nmt):
    known, theirs, ours = nmt
    sequences = sorted(key for key in known if len(key) > 1 and not "가" <= known[key] <= "힣")
    singles = sorted(key for key in known if len(key) == 1)
    later = sorted({char for key in known for char in key[1:]})
    marks = [c for c in map(chr, range(0x300, 0x3000)) if unicodedata.category(c)[0] == "M"]
    every = [chr(code) for code in range(0x11_0000) if not 0xD800 <= code < 0xE000]
    plain = [*"aAeEoq<= \n\r\t\0\1\ufdd0", "\ufdd00", "\u2581", "\u200d", "한", "\u1112", *SYMBOLS]
    kinds = sequences, singles, later, marks, every, plain, [key[0] for key in sequences], CHAINED
    rng = random.Random(1)
    hard = ["".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randint(1, 12))) for _ in range(4000)]
    for text in [*hard, "<<>>\u0338", ">\u0338", "º\u0e33", "º\u0eb3", "a\u0327\u0301", "a\u0302\u0323", ""]:
        assert ours(text) == theirs(text), ascii(text)


@pytest.mark.parametrize(
    "rules",
    [
        {"A": "a", "B": "", "'": "  "},
        {"ab": "X", "abc": "Y", "bc": "Z", "c": "q", "aa": "W"},
        {"e\u0301": "é", "o\u0301": "0", "E": "e", "\u0301": "'"},
        {**COMPOSED, **SINGLES, "q": "\u0301", "z": "\u1161"},
    ],
)
def test_rule_of_ones_own_is_rewritten_longest_first(rules, tmp_path):
    theirs, ours = both(own_rule(tmp_path, rules))
    rng = random.Random(2)
    letters = [
        *sorted({c for key in rules for c in key})[:9],
        *"xeqz\0\u0302\u0301\u1112\u1161\u11ab\U0001f3fb",
    ]
    for _ in range(2000):
        text = "".join(rng.choices(letters, k=rng.randint(0, 9)))
        assert ours(text) == theirs(text), ascii(text)


@pytest.mark.parametrize(
    ("rules", "symbols", "said"),
    [
        ({"a": "b"}, ["<a>"], "knows its user-defined symbol '<a>'"),
        ({f"a{chr(code)}": "X" for code in range(0x100, 0x141)}, [], "in a way that NFC does not"),
        ({"ab": "A", "A": "q"}, [], "makes 'A' of 'ab' in a way that NFC does not"),
        ({"ab": "bX", "bX": "q"}, [], "in a way that NFC does not"),
        ({**COMPOSED, "y\u0307\u0323": "ỵ\u0307"}, [], "in a way that NFC does not"),
        (COMPOSED, [], "leaves .*, which NFC rewrites"),
    ],
)
def test_rule_that_cannot_be_kept_is_refused(rules, symbols, said, tmp_path):
    made = own_rule(tmp_path, rules)
    with pytest.raises(ValueError, match=f"^its normalization rule .*{said}"):
        both(made, symbols)


@pytest.mark.slow
def test_folded_case_is_refused():
    with pytest.raises(ValueError, match=r"^its normalization rule makes .* in a way that NFC does not"):
        both(model(normalization_rule_name="nmt_nfkc_cf"))
