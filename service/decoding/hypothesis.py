"""What every decoder takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Word:
    """One recognised word and where it was heard."""

    text: str
    start_frame: float
    """Output frame at which it begins; parts of a frame count."""
    end_frame: float
    """Output frame at which it ends."""
    confidence: float
    """Between 0 and 1."""


@dataclass(frozen=True)
class Hypothesis:
    """One reading of an emission."""

    words: tuple[Word, ...]
    score: float
    """Log score, comparable between the hypotheses of one emission only."""

    @property
    def text(self) -> str:
        """The words, separated by single spaces."""
        return " ".join(word.text for word in self.words)

    @property
    def confidence(self) -> float:
        """Mean confidence of the words; 0 without words."""
        if not self.words:
            return 0.0
        return sum(word.confidence for word in self.words) / len(self.words)


@dataclass(frozen=True)
class Phrase:
    """Words that a request expects, or does not want."""

    text: str
    weight: float
    """Added to the natural log score where the phrase is read; negative suppresses it."""


class Search(Protocol):
    """A search under way."""

    def read(self, log_probs: FloatArray, *, n_settled: int) -> Hypothesis:
        """Read the next frames and tell the best reading.

        Args:
            log_probs: float32, (frames, token).
            n_settled: frames that the search goes on from; the others are read for this once.
        """
        ...

    def n_shared_words(self) -> int:
        """How many words every reading begins with, whatever is still to come."""
        ...


class Decoder(Protocol):
    """Searches the emission of one utterance."""

    def decode(
        self, emission: FloatArray, *, n_best: int = 1, phrases: Sequence[Phrase] = ()
    ) -> list[Hypothesis]:
        """Return the best hypotheses, best first, at least one, at most `n_best`.

        Args:
            emission: log_probs of one utterance, float32, (frames, token); no frames are allowed.
            n_best: how many hypotheses are wanted.
            phrases: what is expected or unwanted.

        Raises:
            InputError: a phrase cannot be used.
        """
        ...

    def open(self, *, phrases: Sequence[Phrase] = ()) -> Search | None:
        """Begin a search that is fed chunk by chunk; None where there is no such search."""
        ...
