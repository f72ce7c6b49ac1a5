"""The profanity filter: profane words are hidden, everything else stays."""

from __future__ import annotations

import pytest

from service.profanity import is_profane, mask_segment
from service.recogniser import Alternative, Segment, TimedWord


def _alternative(text: str, score: float) -> Alternative:
    words = tuple(
        TimedWord(word, float(i), i + 0.5, confidence=0.1 * i)
        for i, word in enumerate(text.split())
    )
    return Alternative(words, score=score, confidence=0.7)


@pytest.mark.parametrize("word", ["fuck", "fucking", "motherfucker", "shit's", "bastards", "twat"])
def test_profane_words_are_known_in_all_their_forms(word: str) -> None:
    assert is_profane(word)


@pytest.mark.parametrize(
    "word", ["", "scunthorpe", "cockpit", "hello", "assess", "shift", "duck", "swank", "'s"]
)
def test_words_that_only_look_alike_are_not_profane(word: str) -> None:
    assert not is_profane(word)


def test_masked_words_keep_their_first_letter_their_length_and_their_times() -> None:
    segment = Segment(
        (_alternative("what the fuck is this", 3.0), _alternative("what the duck is shit", 2.0)),
        end_s=9.0,
    )
    masked = mask_segment(segment)
    assert [a.transcript for a in masked.alternatives] == [
        "what the f*** is this",
        "what the duck is s***",
    ]
    assert masked.end_s == 9.0
    for before, after in zip(segment.alternatives, masked.alternatives, strict=True):
        assert (after.score, after.confidence) == (before.score, before.confidence)
        assert [(w.start_s, w.end_s, w.confidence) for w in after.words] == [
            (w.start_s, w.end_s, w.confidence) for w in before.words
        ]


def test_segment_without_profane_words_stays_as_it_is() -> None:
    segment = Segment((_alternative("good morning scunthorpe", 1.0), _alternative("", 0.5)), 2.0)
    assert mask_segment(segment) == segment
