"""SentencePiece's normalization rule (`precompiled_charsmap`) as normalizers of the `tokenizers` library.

A rule rewrites the longest sequence that it knows, from left to right. The library's own `Precompiled`
reads the same bytes, but looks up a grapheme shorter than 6 bytes by its shortest prefix and drops the rest,
and a longer one character by character: it is right where a grapheme is one character. So characters are
kept apart while it works, and sequences are composed after it, by NFC, with what the rule does not compose
still kept apart.
"""

import re
import struct
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

from tokenizers import Regex, normalizers

from relora_jax.errors import UserError

APART = "\0"  # between characters; no rule knows it, since C's strings end with it
# What may join the character before it in a grapheme or under NFC; a rule adds its own.
JOINING = r"\p{M}\p{C}\x{1160}-\x{11FF}\x{D7B0}-\x{D7FF}\x{E33}\x{EB3}\x{FF9E}\x{FF9F}\x{1F3FB}-\x{1F3FF}"
MOST_ODD = 64  # sequences that are rewritten one by one, as those that are newer than the library's NFC


def rules(charsmap: bytes) -> dict[str, str]:
    """{sequence: what it becomes} of a charsmap: a length, a double array trie, texts that end with 0."""
    (size,) = struct.unpack_from("<I", charsmap)
    units = struct.unpack_from(f"<{size // 4}I", charsmap, 4)
    texts = charsmap[4 + size :]
    offsets = [unit >> 10 << (unit >> 6 & 8) for unit in units]
    children: dict[int, list[int]] = defaultdict(list)  # a child stands at its parent's node XOR its byte
    for place, unit in enumerate(units):
        if 0 < (byte := unit & 0x8000_00FF) < 256:
            children[place ^ byte].append(place)
    found, stack = {}, [(b"", offsets[0])]
    while stack:
        key, node = stack.pop()
        for place in children[node]:
            longer, child = key + bytes([place ^ node]), place ^ offsets[place]
            stack.append((longer, child))
            if units[place] >> 8 & 1:
                start = units[child] & 0x7FFF_FFFF
                found[longer.decode()] = texts[start : texts.index(0, start)].decode()
    return found


def as_normalizers(charsmap: bytes, symbols: Collection[str]) -> list[Any]:
    """Normalizers that do what the rule does, `symbols` left as they are; UserError where none can."""
    known = rules(charsmap)
    sequences, odd = _sequences(known)
    later = {char for key in sequences for char in key[1:]}
    for symbol in symbols:
        if any(char in known or char in later for char in symbol):
            raise UserError(f"its normalization rule knows its user-defined symbol {symbol!r}")
    joining = later | {key for key, text in known.items() if len(key) == 1 and _joins(text, later)}
    join = rf"(?!\A)(?=[[{JOINING}{_ranges(joining)}]&&[^\0]])"
    free = f"(?<!{_either(symbols)})" if symbols else ""
    inside = f"(?!{free}(?:{'|'.join(_continued(sequences))}))" if sequences else ""
    spare = next(chr(code) for code in range(0xFDD0, 0xFDF0) if chr(code) not in known)
    return [
        normalizers.Replace(spare, f"{spare}0"),  # so that a text may hold both spare and APART
        normalizers.Replace(APART, f"{spare}1"),
        *_replacements(known, odd),
        normalizers.Replace(Regex(join + inside), APART * 2),
        normalizers.Replace(Regex(rf"(?<!\0){join}"), APART),
        normalizers.Precompiled(charsmap),
        normalizers.Replace(Regex(r"(?<!\0)\0(?!\0)"), ""),  # what is single was kept apart for this step
        *[normalizers.NFC()] * bool(sequences),
        normalizers.Replace(Regex(r"\0+"), ""),
        normalizers.Replace(f"{spare}1", APART),
        normalizers.Replace(f"{spare}0", spare),
    ]


def _sequences(known: dict[str, str]) -> tuple[list[str], list[str]]:
    """The sequences left to NFC, which composes them as the rule does, and those that are few, the odd ones.

    UserError where it is not so.
    """
    single = {key: text for key, text in known.items() if len(key) == 1}
    sequences = [key for key in known if len(key) > 1]
    composed = _composed("".join(single.get(char, char) for char in key) for key in sequences)
    same = {key for key, text in zip(sequences, composed, strict=True) if text == known[key]}
    same = same if len(sequences) > MOST_ODD else set()
    odd = [key for key in sequences if key not in same]
    later = {char for key in same for char in key[1:]}
    nested = any(key[0] in later or (len(key) > 2 and key[:-1] not in known) for key in same)
    # what odd ones become is looked at again, and must stay as it is
    again = {*single, *later, *(key[0] for key in odd)} & {*"".join(known[key] for key in odd)}
    if len(odd) > MOST_ODD or nested or again or any(key[0] in later for key in odd):
        key = [*odd, *same][0]
        raise UserError(f"its normalization rule makes {known[key]!r} of {key!r} in a way that NFC does not")
    characters = map(chr, (*range(1, 0xD800), *range(0xE000, 0x3_0000)))  # of higher ones NFC rewrites none
    stay = [single.get(char, char) for char in characters]
    if same and (rewritten := [text for text, new in zip(stay, _composed(stay), strict=True) if text != new]):
        raise UserError(f"its normalization rule leaves {rewritten[0]!r}, which NFC rewrites")
    return [key for key in sequences if key in same], odd


def _composed(texts: Iterable[str]) -> list[str]:
    apart = "".join(f"{text}{APART}" for text in texts)
    return normalizers.NFC().normalize_str(apart).split(APART)[:-1]


def _joins(text: str, later: Collection[str]) -> bool:
    """Whether NFC may join the beginning of a text to what stands before it."""
    vowel_or_end = "\u1160" <= text[:1] <= "\u11ff"  # of a Hangul syllable
    return text != "" and (text[0] in later or unicodedata.category(text[0])[0] == "M" or vowel_or_end)


def _replacements(known: dict[str, str], odd: Collection[str]) -> Iterable[Any]:
    """Rewrites odd sequences one by one: the longest from left to right are first marked by their ends."""
    if odd:
        first = {key[0] for key in odd}
        longest = _either(key for key in known if key[0] in first)
        yield normalizers.Replace(Regex(rf"(?>{longest}|{_class(first)})\K"), APART * 2)
    for key in sorted(odd, key=len, reverse=True):
        yield normalizers.Replace(Regex(rf"{_either([key])}(?=\0\0)"), known[key])


def _continued(sequences: Iterable[str]) -> Iterable[str]:
    """Patterns of the last character of a sequence, where the others stand before it."""
    by_length: dict[int, set[str]] = defaultdict(set)
    for key in sequences:
        by_length[len(key)].add(key)
    for keys in by_length.values():
        for before, last in _by_last(keys):
            yield f"(?<={_pattern(before)}){_class(last)}"


def _by_last(keys: Iterable[str]) -> Iterable[tuple[frozenset[str], set[str]]]:
    """(beginnings, last characters) whose products are the keys."""
    before: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        before[key[-1]].add(key[:-1])
    last: dict[frozenset[str], set[str]] = defaultdict(set)
    for char, beginnings in before.items():
        last[frozenset(beginnings)].add(char)
    return last.items()


def _pattern(keys: Collection[str]) -> str:
    """A pattern of keys of one length."""
    if len(next(iter(keys))) == 1:
        return _class(keys)
    return f"(?:{'|'.join(_pattern(before) + _class(last) for before, last in _by_last(keys))})"


def _either(texts: Iterable[str]) -> str:
    """A pattern of any of the texts, the longest that is there."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))


def _class(chars: Iterable[str]) -> str:
    return f"[{_ranges(chars)}]"


def _ranges(chars: Iterable[str]) -> str:
    """The inside of a character class."""
    runs: list[list[int]] = []
    for code in sorted(map(ord, chars)):
        if runs and runs[-1][1] == code - 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return "".join(
        f"\\x{{{first:X}}}" + (f"-\\x{{{last:X}}}" if last > first else "") for first, last in runs
    )
