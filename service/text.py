"""Text: one normalisation and one mapping to tokens, for training, decoding and scoring.

A transcript is words of a-z and the apostrophe, separated by single spaces. Tokens are characters,
or pieces of words, as a bundle lists them; token 0 is the CTC blank.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from num2words import num2words

BLANK: Final = 0
BLANK_TOKEN: Final = "<blank>"  # noqa: S105  # no password
SPACE: Final = " "
WORD_MARK: Final = "\u2581"
"""What the first piece of a word begins with, as sentencepiece has it."""
CHARACTERS: Final[tuple[str, ...]] = (BLANK_TOKEN, SPACE, "'", *"abcdefghijklmnopqrstuvwxyz")
LETTERS: Final = tuple(c for c in CHARACTERS if c not in (BLANK_TOKEN, SPACE))
"""What words are written with."""

_APOSTROPHES: Final = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\uff07`\u00b4", "'"))
_SPELLED_OUT: Final = {"&": " and ", "%": " percent ", "+": " plus ", "@": " at "}
_THOUSANDS: Final = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_ORDINAL: Final = re.compile(r"(\d+)(?:st|nd|rd|th)\b")
_DECIMAL: Final = re.compile(r"\d+\.\d+")
_DIGITS: Final = re.compile(r"\d+")
_LONGEST_NUMBER: Final = 12  # more digits than this are read one by one
_OTHER: Final = re.compile(r"[^a-z']+")
_LOOSE_APOSTROPHES: Final = re.compile(r"(?<![a-z])'+|'+(?![a-z])")


def normalise(text: str) -> str:
    """Write text as it is spoken: lower case, a-z and inner apostrophes, numbers in words.

    Accents are dropped (`café` → `cafe`), every other sign separates words. Idempotent.
    An apostrophe is kept inside a word only (`don't`); one at an edge is a quotation mark.
    """
    text = unicodedata.normalize("NFKD", text.translate(_APOSTROPHES)).lower()
    text = "".join(c for c in text if not unicodedata.combining(c))
    for sign, words in _SPELLED_OUT.items():
        text = text.replace(sign, words)
    if _DIGITS.search(text):
        text = _say_numbers(text)
    text = _OTHER.sub(" ", text)
    text = _LOOSE_APOSTROPHES.sub(" ", text)
    return " ".join(text.split())


def encode(text: str, tokens: Sequence[str]) -> list[int]:
    """Map normalised text to token ids: characters, or words cut into as few pieces as can be.

    Raises:
        ValueError: a character has no token.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    if are_pieces(tokens):
        longest = max(map(len, tokens))
        return [i for word in text.split() for i in _cut(WORD_MARK + word, ids, longest)]
    missing = sorted({c for c in text if c not in ids})
    if missing:
        raise ValueError(f"no token for {missing}: pass the text through normalise() first")
    return [ids[c] for c in text]


def collapse(token_ids: Iterable[int]) -> list[int]:
    """The CTC map from a path to its labels: merge repeats, then drop blanks."""
    labels: list[int] = []
    previous = BLANK
    for token in token_ids:
        if token not in (previous, BLANK):
            labels.append(int(token))
        previous = token
    return labels


def decode(token_ids: Iterable[int], tokens: Sequence[str]) -> str:
    """Map token ids (labels, not a path) to text with single spaces."""
    return " ".join("".join(tokens[i] for i in token_ids).replace(WORD_MARK, SPACE).split())


def are_pieces(tokens: Iterable[str]) -> bool:
    """Whether tokens are pieces of words, not characters."""
    return any(token.startswith(WORD_MARK) for token in tokens)


def _cut(word: str, ids: Mapping[str, int], longest: int) -> list[int]:
    """The fewest pieces of a word, from the end; of equally many the longer first ones."""
    fewest: list[list[int] | None] = [None] * len(word) + [[]]
    for start in range(len(word) - 1, -1, -1):
        ends = range(min(len(word), start + longest), start, -1)
        ways = [
            [ids[word[start:end]], *rest]
            for end in ends
            if (rest := fewest[end]) is not None and word[start:end] in ids
        ]
        fewest[start] = min(ways, key=len, default=None)
    if fewest[0] is None:
        raise ValueError(f"no tokens for {word!r}: pass the text through normalise() first")
    return fewest[0]


def _say_numbers(text: str) -> str:
    text = _THOUSANDS.sub("", text)
    text = _ORDINAL.sub(lambda m: _say(m[1], ordinal=True), text)
    text = _DECIMAL.sub(_say_decimal, text)
    return _DIGITS.sub(lambda m: _say(m[0], ordinal=False), text)


def _say_decimal(match: re.Match[str]) -> str:
    whole, _, fraction = match[0].partition(".")
    return f"{_say(whole, ordinal=False)} point {_say_digits(fraction)}"


def _say(digits: str, *, ordinal: bool) -> str:
    if len(digits) > _LONGEST_NUMBER or (digits.startswith("0") and len(digits) > 1):
        return f" {_say_digits(digits)} "
    words = num2words(int(digits), to="ordinal" if ordinal else "cardinal")
    return f" {words.replace(' and ', ' ')} "


def _say_digits(digits: str) -> str:
    return " ".join(num2words(int(d)) for d in digits)
