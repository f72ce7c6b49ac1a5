"""The n-gram of a domain: sampled sentences over a floor of the bundle's other words.

Sampled counts are no natural counts, so nothing is discounted: each context keeps a fixed share
for the shorter one, down to single words, where a fixed share belongs to words from outside
(Jelinek-Mercer smoothing; an ARPA file expresses it exactly).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from service.decoding.ngram import SENTENCE_END, SENTENCE_START, UNKNOWN

ORDER: Final = 5
SHORTER_SHARE: Final = 0.03
_NEVER: Final = -99.0

Ngram = tuple[str, ...]


def write_domain_arpa(
    sentences: Iterable[Sequence[str]],
    general: Mapping[str, float],
    path: Path,
    *,
    general_weight: float,
    order: int = ORDER,
) -> None:
    """Estimate the model and write it as an ARPA file.

    Args:
        sentences: of the domain, in words.
        general: probability of each word from outside; they are scaled to sum to one.
        path: the file to write.
        general_weight: share of the single words' probability that belongs to those from outside.
        order: longest n-gram.
    """
    counts = _count(sentences, order)
    levels = [_unigrams(counts[0], general, general_weight)]
    for n in range(2, order + 1):
        levels.append(_extend(counts[n - 1], levels[-1]))
    contexts = {ngram[:-1] for level in levels[1:] for ngram in level}
    with path.open("w", encoding="utf-8") as file:
        file.write("\\data\\\n")
        file.writelines(f"ngram {n}={len(level)}\n" for n, level in enumerate(levels, 1))
        for n, level in enumerate(levels, 1):
            file.write(f"\n\\{n}-grams:\n")
            file.writelines(
                f"{_log10(prob):.6f}\t{' '.join(ngram)}{_backoff(ngram, contexts)}\n"
                for ngram, prob in sorted(level.items())
            )
        file.write("\n\\end\\\n")


def _count(sentences: Iterable[Sequence[str]], order: int) -> list[Counter[Ngram]]:
    """How often each n-gram occurs, from order 1 on; the sentence's begin is only a context."""
    counts: list[Counter[Ngram]] = [Counter() for _ in range(order)]
    for sentence in sentences:
        words = (SENTENCE_START, *sentence, SENTENCE_END)
        for end in range(2, len(words) + 1):
            for n in range(1, min(order, end) + 1):
                counts[n - 1][words[end - n : end]] += 1
    return counts


def _unigrams(
    counts: Counter[Ngram], general: Mapping[str, float], weight: float
) -> dict[Ngram, float]:
    if not general:
        weight = 0.0
    total, general_total = counts.total(), sum(general.values())
    probs = {ngram: (1 - weight) * n / total for ngram, n in counts.items()}
    for word, prob in general.items():
        probs[word,] = probs.get((word,), 0.0) + weight * prob / general_total
    return {**probs, (SENTENCE_START,): 0.0, (UNKNOWN,): 0.0}


def _extend(counts: Counter[Ngram], shorter: Mapping[Ngram, float]) -> dict[Ngram, float]:
    """Probabilities of n-grams, given those that are one shorter."""
    totals: Counter[Ngram] = Counter()
    for ngram, n in counts.items():
        totals[ngram[:-1]] += n
    return {
        ngram: (1 - SHORTER_SHARE) * n / totals[ngram[:-1]] + SHORTER_SHARE * shorter[ngram[1:]]
        for ngram, n in counts.items()
    }


def _log10(prob: float) -> float:
    return math.log10(prob) if prob > 0 else _NEVER


def _backoff(ngram: Ngram, contexts: set[Ngram]) -> str:
    return f"\t{math.log10(SHORTER_SHARE):.6f}" if ngram in contexts else ""
