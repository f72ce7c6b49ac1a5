"""Word and character error rates, with counts, for evaluation and training alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import jiwer
import numpy as np

from service.text import normalise

_N_RESAMPLED: Final = 10_000
_INTERVAL: Final = (0.025, 0.975)
_FEWEST_SPEAKERS: Final = 3


@dataclass(frozen=True)
class ErrorCounts:
    """Errors of a set of transcripts; add two to pool them."""

    n_words: int = 0
    """Words in the references."""
    n_substitutions: int = 0
    """Words recognised as another word."""
    n_deletions: int = 0
    """Reference words that are missing."""
    n_insertions: int = 0
    """Recognised words that the reference lacks."""
    n_characters: int = 0
    """Characters in the references, spaces included."""
    n_character_errors: int = 0
    """Character substitutions, deletions and insertions."""

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.n_words + other.n_words,
            self.n_substitutions + other.n_substitutions,
            self.n_deletions + other.n_deletions,
            self.n_insertions + other.n_insertions,
            self.n_characters + other.n_characters,
            self.n_character_errors + other.n_character_errors,
        )

    @property
    def n_errors(self) -> int:
        """Substitutions, deletions and insertions of words."""
        return self.n_substitutions + self.n_deletions + self.n_insertions

    @property
    def wer(self) -> float:
        """Word error rate, a fraction; with no reference words, 0 or 1 as there are insertions."""
        return _rate(self.n_errors, self.n_words)

    @property
    def cer(self) -> float:
        """Character error rate, a fraction."""
        return _rate(self.n_character_errors, self.n_characters)

    def as_json(self) -> dict[str, float | int]:
        """The fields of `voxgate evaluate --json`."""
        return {
            "wer": self.wer,
            "cer": self.cer,
            "n_words": self.n_words,
            "n_substitutions": self.n_substitutions,
            "n_deletions": self.n_deletions,
            "n_insertions": self.n_insertions,
        }


def count_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    """Align normalised hypotheses with normalised references and count the errors.

    Raises:
        ValueError: the two sequences differ in length.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses")
    pairs = [(normalise(r), normalise(h)) for r, h in zip(references, hypotheses, strict=True)]
    return sum((_count_pair(r, h) for r, h in pairs), ErrorCounts())


def _count_pair(reference: str, hypothesis: str) -> ErrorCounts:
    if not reference:  # jiwer refuses an empty reference: everything recognised is an insertion
        n_words = len(hypothesis.split())
        return ErrorCounts(n_insertions=n_words, n_character_errors=len(hypothesis))
    words = jiwer.process_words(reference, hypothesis)
    characters = jiwer.process_characters(reference, hypothesis)
    return ErrorCounts(
        n_words=len(reference.split()),
        n_substitutions=words.substitutions,
        n_deletions=words.deletions,
        n_insertions=words.insertions,
        n_characters=len(reference),
        n_character_errors=characters.substitutions + characters.deletions + characters.insertions,
    )


def _rate(n_errors: int, n_reference: int) -> float:
    if n_reference == 0:
        return float(n_errors > 0)
    return n_errors / n_reference


def pool(counts: Iterable[ErrorCounts]) -> ErrorCounts:
    """Add up counts."""
    return sum(counts, ErrorCounts())


def wer_interval(by_speaker: Sequence[ErrorCounts]) -> tuple[float, float] | None:
    """The 95 % bootstrap interval of the word error rate, resampled by speaker.

    Args:
        by_speaker: errors of each speaker; those of one go together, as they are alike.

    Returns:
        The lowest and the highest rate, fractions; None of fewer than three speakers with words,
        who say nothing of others.
    """
    said = [counts for counts in by_speaker if counts.n_words]
    if len(said) < _FEWEST_SPEAKERS:
        return None
    n_errors = np.array([counts.n_errors for counts in said])
    n_words = np.array([counts.n_words for counts in said])
    draw = np.random.default_rng(0)
    times = draw.multinomial(len(said), np.full(len(said), 1 / len(said)), _N_RESAMPLED)
    low, high = np.quantile((times @ n_errors) / (times @ n_words), _INTERVAL)
    return float(low), float(high)


def format_interval(by_speaker: Sequence[ErrorCounts]) -> str:
    """`wer_interval` for people; a dash where there is none."""
    interval = wer_interval(by_speaker)
    return "-" if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}"
