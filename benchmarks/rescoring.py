"""What second-pass rescoring is worth: word error rate before and after, and its time.

python benchmarks/rescoring.py DEV.jsonl RESCORER.onnx [--corpus NAME] [--n-best N] [--margin M]

The search gives the best readings of each utterance. A reading's new score is the search's
score (acoustics, n-gram, words), plus a weight times what the recurrent model says of it, plus one
times what the n-gram says (which takes the n-gram back where it is negative), plus a score for each
word. The three are chosen on the speakers of one half and applied to the other, both ways round,
and the errors are pooled. The oracle takes the reading of each list that has the fewest errors.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from service.bundle import RescoringSettings, find_bundle, load_bundle
from service.decoding.beam import BeamDecoder
from service.decoding.hypothesis import FloatArray, Hypothesis
from service.decoding.ngram import NgramModel, load_ngram
from service.errors import InputError
from service.recogniser import make_beam_decoder
from service.rescorer import BOUNDARY_ID, N_HISTORY, Rescorer, build_levels
from service.rescoring import count_near, describe_readings
from service.tuning import fit_rescoring, read_items, score_readings
from training.precision import processor_name


@dataclass(frozen=True)
class TimedList:
    """What the second pass over one utterance takes."""

    n_readings: int
    n_words: int
    """Of the search's best reading."""
    n_nodes: int
    """Pieces of different beginnings: what the recurrent model reads."""
    seconds: float
    """Of both language models."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("rescorer", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--corpus", default="", help="only these lines of the manifest")
    parser.add_argument("--n-best", type=int, default=RescoringSettings().n_best)
    parser.add_argument("--margin", type=float, default=RescoringSettings().margin)
    parser.add_argument("--history", type=int, default=N_HISTORY, help="pieces; 0 reads each")
    arguments = parser.parse_args()
    folder = find_bundle(arguments.bundle)
    bundle = load_bundle(folder)
    if bundle.ngram is None:
        raise InputError(f"{folder} has no language model; the search needs one")
    lm, head = load_ngram(bundle.ngram), bundle.config.decoding.search_tokens
    decoder = make_beam_decoder(bundle, lm, head, bundle.config.decoding.of(head))
    n_history = arguments.history or None
    rescorer = Rescorer(arguments.rescorer, n_history=n_history)
    wanted = arguments.corpus
    items = [i for i in read_items(folder, arguments.manifest) if wanted in ("", i.corpus)]
    rescorer.score([["warm", "up"]])
    found = [decoder.decode(i.emissions[head], n_best=arguments.n_best) for i in items]
    print(f"{len(items)} utterances of {wanted or 'all corpora'}, {head}, {processor_name()}")
    _report_search(decoder, [i.emissions[head] for i in items], n_read=arguments.n_best)
    found = [
        readings[: count_near(np.array([reading.score for reading in readings]), arguments.margin)]
        for readings in found
    ]
    _report_times([_time_list(readings, rescorer, lm, n_history) for readings in found])
    fit_rescoring(
        items, [score_readings(i, r, rescorer, lm) for i, r in zip(items, found, strict=True)]
    )


def _report_search(decoder: BeamDecoder, emissions: Sequence[FloatArray], *, n_read: int) -> None:
    """How long the search takes for one reading, for a list to rank, and for a whole list."""
    ways: dict[str, Callable[[FloatArray], object]] = {
        "1 reading": decoder.decode,
        f"{n_read} to rank": lambda e: decoder.decode_ranked(e, lambda _, s: s, n_read=n_read),
        f"{n_read} with times": lambda e: decoder.decode(e, n_best=n_read),
    }
    for name, search in ways.items():
        seconds = []
        for emission in emissions:
            start = time.perf_counter()
            search(emission)
            seconds.append(time.perf_counter() - start)
        print(f"search, {name}: {1000 * np.median(seconds):.1f} ms (median)")


def _time_list(
    found: Sequence[Hypothesis], rescorer: Rescorer, lm: NgramModel, n_history: int | None
) -> TimedList:
    readings = [reading.text.split() for reading in found]
    start = time.perf_counter()
    describe_readings(readings, rescorer, lm)
    seconds = time.perf_counter() - start
    pieces = [
        [i for word in words for i in rescorer.pieces.encode(word)] + [BOUNDARY_ID]
        for words in readings
    ]
    return TimedList(
        n_readings=len(found),
        n_words=len(found[0].words),
        n_nodes=sum(len(level.tokens) for level in build_levels(pieces, n_history)[0]),
        seconds=seconds,
    )


def _report_times(lists: Sequence[TimedList]) -> None:
    milliseconds = np.array([1000 * found.seconds for found in lists])
    n_words = np.array([found.n_words for found in lists])
    n_nodes = np.array([found.n_nodes for found in lists])
    n_readings = np.array([found.n_readings for found in lists])
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


if __name__ == "__main__":
    main()
