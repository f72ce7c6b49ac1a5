"""How likely an interim word is to be in the final result."""

from __future__ import annotations

from typing import Final

import numpy as np

from service.bundle import Survival
from service.decoding.hypothesis import Word

SETTLING_PROBABILITY: Final = 0.97
"""A word that survives with at least this probability is committed."""
_HIGHEST_CONFIDENCE: Final = 0.999


def survival_inputs(word: Word, *, n_settled: int, n_known: int) -> tuple[float, ...]:
    """What the survival of a word is judged by, in the order of `Survival`'s weights.

    Args:
        word: of the interim reading.
        n_settled: settled output frames of the utterance.
        n_known: settled and tentative ones.
    """
    confidence = min(max(word.confidence, 1 - _HIGHEST_CONFIDENCE), _HIGHEST_CONFIDENCE)
    return (
        1.0,
        float(np.log(confidence / (1 - confidence))),
        float(word.end_frame <= n_settled),
        float(np.log1p(max(0, n_known - word.end_frame))),
        float(np.log(len(word.text))),
    )


def survival_probability(word: Word, weights: Survival, *, n_settled: int, n_known: int) -> float:
    """Probability that the word is in the final result; see `survival_inputs`."""
    inputs = survival_inputs(word, n_settled=n_settled, n_known=n_known)
    log_odds = float(np.dot(inputs, list(weights.model_dump().values())))
    return float(1 / (1 + np.exp(-log_odds)))
