"""Pronunciations: words as phones, from the CMU dictionary in the pocketsphinx package."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from service.errors import MissingExtraError
from service.text import BLANK_TOKEN

PHONES: Final[tuple[str, ...]] = (
    BLANK_TOKEN,
    *"AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH".split(),
    *"T TH UH UW V W Y Z ZH".split(),
)
"""The 39 phones of the CMU dictionary, without stress, after the CTC blank."""

Dictionary = Mapping[str, Sequence[tuple[str, ...]]]
"""Lower-case words and their pronunciations, the usual one first."""

Pronounce = Callable[[Sequence[str]], list[tuple[str, ...]]]
"""What gives each word its phones."""

_VARIANT: Final = re.compile(r"\(\d+\)$")


@functools.cache
def load_dictionary() -> Dictionary:
    """Read the dictionary: lower-case word → its pronunciations, the usual one first.

    Raises:
        MissingExtraError: the pocketsphinx package is not installed.
    """
    spec = importlib.util.find_spec("pocketsphinx")
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            "the phone head needs the dictionary of the pocketsphinx package: "
            "pip install 'voxgate[train]'"
        )
    path = Path(spec.origin).parent / "model" / "en-us" / "cmudict-en-us.dict"
    return parse_dictionary(path.read_text(encoding="utf-8"))


def parse_dictionary(text: str) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Parse lines of `word PHONE PHONE …`; `word(2)` is a further pronunciation of `word`."""
    pronunciations: dict[str, tuple[tuple[str, ...], ...]] = {}
    for line in text.splitlines():
        word, *phones = line.split()
        word = _VARIANT.sub("", word)
        pronunciations[word] = (*pronunciations.get(word, ()), tuple(phones))
    return pronunciations


def pronounce(text: str, dictionary: Dictionary) -> list[int] | None:
    """Phone ids of normalised text, each word said the usual way; None if a word is unknown."""
    ids = _phone_ids()
    words = [dictionary.get(word) for word in text.split()]
    if any(word is None for word in words):
        return None
    return [ids[phone] for word in words if word is not None for phone in word[0]]


def find_variants(text: str, dictionary: Dictionary) -> list[list[tuple[int, ...]]]:
    """Phone ids of each pronunciation of each word of normalised text.

    Raises:
        KeyError: a word is unknown.
    """
    ids = _phone_ids()
    return [
        [tuple(ids[phone] for phone in phones) for phones in dictionary[word]]
        for word in text.split()
    ]


def make_lexicon(
    words: Iterable[str], dictionary: Dictionary, pronounce: Pronounce | None
) -> Dictionary:
    """Pronunciations of the words: the dictionary's, for others the letters-to-phones graph's.

    Words that have neither are left out.
    """
    lexicon: dict[str, Sequence[tuple[str, ...]]] = {}
    unknown = []
    for word in words:
        if word in dictionary:
            lexicon[word] = dictionary[word]
        elif word.strip("'"):
            unknown.append(word)
    if pronounce is not None:
        pairs = zip(unknown, pronounce(unknown), strict=True)
        lexicon.update({word: (phones,) for word, phones in pairs if phones})
    return lexicon


@functools.cache
def _phone_ids() -> Mapping[str, int]:
    return {phone: i for i, phone in enumerate(PHONES)}


def unknown_words(text: str, dictionary: Mapping[str, Sequence[object]]) -> list[str]:
    """The words of normalised text that the dictionary lacks."""
    return [word for word in text.split() if word not in dictionary]
