"""How likely an interim word is to be in the final result."""

from __future__ import annotations

import math
from operator import mul
from typing import Final

from service.bundle import Survival
from service.decoding.hypothesis import Word

SETTLING_PROBABILITY: Final = 0.97
"""A word that survives with at least this probability is committed."""
_HIGHEST_CONFIDENCE: Final = 0.999
_MOST_LOG_ODDS: Final = 700.0  # more is beyond what exp can return


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
        math.log(confidence / (1 - confidence)),
        float(word.end_frame <= n_settled),
        math.log1p(max(0, n_known - word.end_frame)),
        math.log(len(word.text)),
    )


def _in_order(weights: Survival) -> tuple[float, ...]:
    return (
        weights.intercept,
        weights.confidence,
        weights.settled,
        weights.distance,
        weights.length,
    )


def survival_probability(word: Word, weights: Survival, *, n_settled: int, n_known: int) -> float:
    """Probability that the word is in the final result; see `survival_inputs`."""
    inputs = survival_inputs(word, n_settled=n_settled, n_known=n_known)
    log_odds = sum(map(mul, inputs, _in_order(weights)))
    return 1 / (1 + math.exp(min(_MOST_LOG_ODDS, -log_odds)))
