"""The second pass over a final result: its best readings, ranked anew by a recurrent model.

The search gives the readings and their scores of acoustics, n-gram and words. To these come a
weight times what the recurrent model says of a reading, a weight times what the n-gram says (which
takes the n-gram back where it is negative), and a score for each word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from service.bundle import RescoringSettings
from service.decoding.hypothesis import Decoder, FloatArray, Hypothesis, Phrase, Search
from service.decoding.ngram import NgramModel
from service.rescorer import Rescorer

DoubleArray = npt.NDArray[np.float64]

_FEWEST_LOG10: Final = -10.0  # what a word outside the n-gram's list costs at most


class RescoringDecoder:
    """A beam search and the second pass over what it found; interim results are the search's."""

    def __init__(
        self,
        decoder: Decoder,
        rescorer: Rescorer,
        lm: NgramModel,
        settings: RescoringSettings,
    ) -> None:
        """Combine a search with its second pass.

        Args:
            decoder: the search.
            rescorer: the recurrent model.
            lm: the search's n-gram.
            settings: how many readings are scored, and the weights.
        """
        self._decoder = decoder
        self._rescorer = rescorer
        self._lm = lm
        self._n_best = settings.n_best
        self._weights = np.array(
            [settings.recurrent_weight, settings.ngram_weight, settings.word_score]
        )

    def decode(
        self, emission: FloatArray, *, n_best: int = 1, phrases: Sequence[Phrase] = ()
    ) -> list[Hypothesis]:
        """The best readings of both passes together; see `Decoder`."""
        found = self._decoder.decode(emission, n_best=max(n_best, self._n_best), phrases=phrases)
        if len(found) == 1:
            return found
        features = describe_readings(found, self._rescorer, self._lm)
        scores = np.array([hypothesis.score for hypothesis in found]) + features @ self._weights
        order = np.argsort(-scores, kind="stable")[:n_best]
        return [replace(found[i], score=float(scores[i])) for i in order]

    def open(self, *, phrases: Sequence[Phrase] = ()) -> Search | None:
        """Begin a search that is fed chunk by chunk."""
        return self._decoder.open(phrases=phrases)


def describe_readings(
    readings: Sequence[Hypothesis], rescorer: Rescorer, lm: NgramModel
) -> DoubleArray:
    """What the second pass weighs: both models' natural log probabilities, and the words.

    Returns:
        float64, (reading, 3).
    """
    texts = [[word.text for word in reading.words] for reading in readings]
    ngram = [
        math.log(10) * sum(max(_FEWEST_LOG10, score) for score in lm.score(words))
        for words in texts
    ]
    return np.column_stack([rescorer.score(texts), ngram, [len(words) for words in texts]])
