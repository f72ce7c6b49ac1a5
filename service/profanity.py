"""Writes profane words as their first letter and asterisks, as Google's filter does."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from service.recogniser import Segment

_STEMS: Final = ("fuck", "motherfuck", "shit", "bullshit", "cunt", "wank", "bitch")
_WORDS: Final = frozenset({
    "arsehole", "arseholes", "asshole", "assholes", "bastard", "bastards", "bollocks",
    "cocksucker", "cocksuckers", "dickhead", "dickheads", "faggot", "faggots", "goddamn",
    "nigger", "niggers", "slut", "sluts", "twat", "twats", "whore", "whores",
})  # fmt: skip


def is_profane(word: str) -> bool:
    """Whether a word, in lower case, is one that the filter hides."""
    word = word.removesuffix("'s")
    return word in _WORDS or word.startswith(_STEMS)


def mask_segment(segment: Segment) -> Segment:
    """The segment with its profane words hidden."""
    alternatives = tuple(
        replace(
            alternative,
            words=tuple(
                replace(word, text=word.text[0] + "*" * (len(word.text) - 1))
                if is_profane(word.text)
                else word
                for word in alternative.words
            ),
        )
        for alternative in segment.alternatives
    )
    return replace(segment, alternatives=alternatives)
