"""What second-pass rescoring is worth: word error rate before and after, and its time.

python benchmarks/rescoring.py DEV.jsonl RESCORER.onnx [--bundle DIR] [--corpus NAME]

The search gives the 100 best readings of each utterance. A reading's new score is the search's
score (acoustics, n-gram, words), plus a weight times what the recurrent model says of it, plus one
times what the n-gram says (which takes the n-gram back where it is negative), plus a score for each
word. The three are chosen on the speakers of one half and applied to the other, both ways round,
and the errors are pooled. The oracle takes the reading of each list that has the fewest errors.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from service.bundle import find_bundle, load_bundle
from service.decoding.beam import BeamDecoder
from service.decoding.ngram import NgramModel, load_ngram
from service.errors import InputError
from service.recogniser import make_beam_decoder
from service.rescorer import BOUNDARY_ID, Rescorer, build_trie
from service.scoring import ErrorCounts, count_errors, pool
from service.tuning import Item, halves_of, read_items
from training.precision import processor_name

DoubleArray = npt.NDArray[np.float64]
Weights = tuple[float, float, float]
"""Of the recurrent model, of the n-gram, of a word; all natural log."""

_FEWEST_LOG10: Final = -10.0  # what a word outside the n-gram's list costs at most
_GRID: Final = (
    tuple(np.round(np.arange(0.0, 1.55, 0.1), 2).tolist()),
    tuple(np.round(np.arange(-0.8, 0.25, 0.1), 2).tolist()),
    (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5),
)


@dataclass(frozen=True)
class ScoredList:
    """The readings of one utterance."""

    errors: list[ErrorCounts]
    """Of each reading, best first as the search has it."""
    searched: DoubleArray
    """The search's scores, float64, (reading,)."""
    features: DoubleArray
    """What the weights multiply, float64, (reading, 3)."""
    n_words: int
    """Of the search's best reading."""
    n_nodes: int
    """Pieces of different beginnings: what the recurrent model reads."""
    rescoring_s: float
    """Seconds that the recurrent model took."""

    def choose(self, weights: Weights) -> ErrorCounts:
        """Errors of the best reading by these weights; the first of equal ones."""
        return self.errors[int(np.argmax(self.searched + self.features @ np.array(weights)))]

    def find_best(self) -> ErrorCounts:
        """Errors of the reading that has the fewest."""
        return min(self.errors, key=lambda counts: counts.n_errors)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("rescorer", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--corpus", default="", help="only these lines of the manifest")
    parser.add_argument("--n-best", type=int, default=100)
    arguments = parser.parse_args()
    folder = find_bundle(arguments.bundle)
    bundle = load_bundle(folder)
    if bundle.ngram is None:
        raise InputError(f"{folder} has no language model; the search needs one")
    lm, head = load_ngram(bundle.ngram), bundle.config.decoding.search_tokens
    decoder = make_beam_decoder(bundle, lm, head, bundle.config.decoding.of(head))
    rescorer = Rescorer(arguments.rescorer)
    wanted = arguments.corpus
    items = [i for i in read_items(folder, arguments.manifest) if wanted in ("", i.corpus)]
    rescorer.score([["warm", "up"]])
    lists = []
    for item in items:
        emission = item.emissions[head]
        lists.append(_score_list(item, emission, decoder, lm, rescorer, n_best=arguments.n_best))
    print(f"{len(items)} utterances of {wanted or 'all corpora'}, {head}, {processor_name()}")
    _report_times(lists)
    _report_errors(items, lists)


def _score_list(
    item: Item,
    emission: npt.NDArray[np.float32],
    decoder: BeamDecoder,
    lm: NgramModel,
    rescorer: Rescorer,
    *,
    n_best: int,
) -> ScoredList:
    found = decoder.decode(emission, n_best=n_best)
    readings = [[word.text for word in hypothesis.words] for hypothesis in found]
    start = time.perf_counter()
    recurrent = rescorer.score(readings)
    seconds = time.perf_counter() - start
    features = np.column_stack(
        [recurrent, [_score_ngram(lm, words) for words in readings], [*map(len, readings)]]
    )
    pieces = [
        [i for word in words for i in rescorer.pieces.encode(word)] + [BOUNDARY_ID]
        for words in readings
    ]
    return ScoredList(
        errors=[count_errors([item.reference], [" ".join(words)]) for words in readings],
        searched=np.array([hypothesis.score for hypothesis in found]),
        features=features,
        n_words=len(readings[0]),
        n_nodes=sum(len(level.tokens) for level in build_trie(pieces)[0]),
        rescoring_s=seconds,
    )


def _score_ngram(lm: NgramModel, words: Sequence[str]) -> float:
    """Natural log probability of a sentence."""
    return math.log(10) * sum(max(_FEWEST_LOG10, score) for score in lm.score(words))


def _report_times(lists: Sequence[ScoredList]) -> None:
    milliseconds = np.array([1000 * found.rescoring_s for found in lists])
    n_words = np.array([found.n_words for found in lists])
    n_nodes = np.array([found.n_nodes for found in lists])
    n_readings = np.array([len(found.errors) for found in lists])
    print(
        f"lists of {n_readings.mean():.0f} readings, {n_words.mean():.1f} words and "
        f"{n_nodes.mean():.0f} nodes on average"
    )
    print(
        f"rescoring: {np.median(milliseconds):.1f} ms a list (median), "
        f"{np.percentile(milliseconds, 95):.1f} ms (95 %)"
    )
    longer = (n_words >= 24) & (n_words <= 30)
    if longer.any():
        print(
            f"lists of 24 to 30 words: {np.median(milliseconds[longer]):.1f} ms, "
            f"{np.median(n_nodes[longer]):.0f} nodes (medians)"
        )


def _report_errors(items: Sequence[Item], lists: Sequence[ScoredList]) -> None:
    in_first = halves_of(items)
    rescored: list[ErrorCounts] = [found.errors[0] for found in lists]
    for half in (in_first, ~in_first):
        weights = fit_weights([lists[i] for i in np.flatnonzero(half)])
        print("one half chooses rnn {:g}, n-gram {:g}, word {:g}".format(*weights))
        for i in np.flatnonzero(~half):
            rescored[i] = lists[i].choose(weights)
    before = pool(found.errors[0] for found in lists).wer
    after, oracle = pool(rescored).wer, pool(found.find_best() for found in lists).wer
    print(
        f"WER {before:.2%} before, {after:.2%} after ({after / before - 1:+.1%} relative), "
        f"{oracle:.2%} oracle"
    )
    print("all speakers choose rnn {:g}, n-gram {:g}, word {:g}".format(*fit_weights(lists)))


def fit_weights(lists: Sequence[ScoredList]) -> Weights:
    """The weights of the grid that give the fewest word errors; the smallest of equal ones."""
    grid: list[Weights] = sorted(product(*_GRID), key=lambda weights: sum(abs(w) for w in weights))
    n_errors = np.zeros(len(grid), np.int64)
    for found in lists:
        totals = found.searched[:, None] + found.features @ np.array(grid).T  # (reading, weights)
        n_errors += np.array([e.n_errors for e in found.errors])[totals.argmax(axis=0)]
    return grid[int(n_errors.argmin())]


if __name__ == "__main__":
    main()
