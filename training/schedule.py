"""The learning rate of a step."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, progress: float, n_warmup_steps: int, highest: float, final: float
) -> float:
    """Linear warm-up from zero, under half a cosine from `highest` to `final`.

    Args:
        step: optimiser steps made so far.
        progress: share of the run that is done, 0 to 1.
        n_warmup_steps: steps of the warm-up.
        highest: learning rate at the start of the cosine.
        final: learning rate at its end.
    """
    warmup = min(1.0, (step + 1) / max(1, n_warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return warmup * (final + (highest - final) * cosine)
