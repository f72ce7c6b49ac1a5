"""What the compiled search must find: by enumeration, and by the same algorithm plainly.

Both take a language as functions, know nothing of tries, trees or masses, and are slow.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt

from service.text import BLANK, collapse

FloatArray = npt.NDArray[np.float32]
Words = tuple[str, ...]
LanguageScore = Callable[[Words], float]
"""Natural log score of a finished sentence."""
Spell = Callable[[Sequence[str]], Iterator[Words]]
"""The sentences that a sequence of tokens spells."""


def enumerate_readings(
    log_probs: FloatArray, tokens: Sequence[str], spell: Spell, language: LanguageScore
) -> dict[Words, float]:
    """Log score of every reading: the sum over all paths, times the language's score."""
    mass: dict[tuple[str, ...], float] = defaultdict(float)
    for path in product(range(len(tokens)), repeat=len(log_probs)):
        probability = math.exp(sum(float(log_probs[t, i]) for t, i in enumerate(path)))
        mass[tuple(tokens[i] for i in collapse(path))] += probability
    total: dict[Words, float] = defaultdict(float)
    for labels, probability in mass.items():
        for words in spell(labels):
            total[words] += probability * math.exp(language(words))
    return {words: math.log(weight) for words, weight in total.items() if weight > 0}


def search_prefixes(
    log_probs: FloatArray,
    tokens: Sequence[str],
    score: Callable[[tuple[str, ...]], float],
    *,
    beam_width: int,
) -> dict[tuple[str, ...], float]:
    """CTC prefix beam search (Hannun et al., 2014) over token sequences.

    Args:
        log_probs: of one utterance, float32, (frames, token).
        tokens: token list, blank first.
        score: natural log score of a prefix.
        beam_width: prefixes kept after each frame.

    Returns:
        Natural log score of each prefix of the last beam.
    """
    beam: dict[tuple[str, ...], tuple[float, float]] = {(): (1.0, 0.0)}
    for row in np.exp(log_probs.astype(np.float64)):
        following: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for prefix, (blank, token) in beam.items():
            following[prefix][0] += (blank + token) * row[BLANK]
            for i, name in enumerate(tokens):
                if i == BLANK:
                    continue
                longer = (*prefix, name)
                if prefix and prefix[-1] == name:
                    following[prefix][1] += token * row[i]
                    following[longer][1] += blank * row[i]
                else:
                    following[longer][1] += (blank + token) * row[i]
        ranked = sorted(following, key=lambda p: -sum(following[p]) * math.exp(score(p)))
        beam = {p: (following[p][0], following[p][1]) for p in ranked[:beam_width]}
    return {
        prefix: math.log(sum(mass)) + score(prefix) for prefix, mass in beam.items() if sum(mass)
    }
