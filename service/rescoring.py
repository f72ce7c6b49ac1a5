"""The second pass over a final result: its best readings, ranked anew by a recurrent model.

The search gives the readings and their scores of acoustics, n-gram and words. To these come a
weight times what the recurrent model says of a reading, a weight times what the n-gram says (which
takes the n-gram back where it is negative), and a score for each word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from service.bundle import RescoringSettings
from service.decoding.beam import BeamDecoder
from service.decoding.hypothesis import FloatArray, Hypothesis, Phrase, Search
from service.decoding.ngram import NgramModel
from service.rescorer import Rescorer

DoubleArray = npt.NDArray[np.float64]

_FEWEST_LOG10: Final = -10.0  # what a word outside the n-gram's list costs at most


class RescoringDecoder:
    """A beam search and the second pass over what it found; interim results are the search's."""

    def __init__(
        self,
        decoder: BeamDecoder,
        rescorer: Rescorer,
        lm: NgramModel,
        settings: RescoringSettings,
    ) -> None:
        """Combine a search with its second pass.

        Args:
            decoder: the search.
            rescorer: the recurrent model.
            lm: the search's n-gram.
            settings: which readings are scored, and the weights.
        """
        self._decoder = decoder
        self._rescorer = rescorer
        self._lm = lm
        self._n_best = settings.n_best
        self._margin = settings.margin
        self._weights = np.array(
            [settings.recurrent_weight, settings.ngram_weight, settings.word_score]
        )

    def decode(
        self, emission: FloatArray, *, n_best: int = 1, phrases: Sequence[Phrase] = ()
    ) -> list[Hypothesis]:
        """The best readings of both passes together; see `Decoder`."""
        return self._decoder.decode_ranked(
            emission,
            self._rank,
            n_read=max(n_best, self._n_best),
            n_best=n_best,
            phrases=phrases,
        )

    def _rank(self, readings: Sequence[Sequence[str]], scores: DoubleArray) -> DoubleArray:
        n_near = count_near(scores, self._margin)
        features = describe_readings(readings[:n_near], self._rescorer, self._lm)
        near, far = scores[:n_near] + features @ self._weights, scores[n_near:]
        if len(far):
            far = far + min(0.0, near.min() - far[0])  # they stay behind
        return np.concatenate([near, far])

    def open(self, *, phrases: Sequence[Phrase] = ()) -> Search | None:
        """Begin a search that is fed chunk by chunk."""
        return self._decoder.open(phrases=phrases)


def count_near(scores: DoubleArray, margin: float) -> int:
    """How many readings, best first, are so near to the best that they are ranked anew.

    Args:
        scores: natural log scores of the search, float64, (reading,).
        margin: how far below the best one.
    """
    return int((scores >= scores[0] - margin).sum())


def describe_readings(
    readings: Sequence[Sequence[str]], rescorer: Rescorer, lm: NgramModel
) -> DoubleArray:
    """What the second pass weighs: both models' natural log probabilities, and the words.

    Returns:
        float64, (reading, 3).
    """
    ngram = [
        math.log(10) * sum(max(_FEWEST_LOG10, score) for score in lm.score(words))
        for words in readings
    ]
    return np.column_stack([rescorer.score(readings), ngram, [len(words) for words in readings]])
