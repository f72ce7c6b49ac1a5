"""What the search over phones loses by its pruning, and what wider pruning costs.

python benchmarks/pruning.py DEV.jsonl [--bundle DIR] [--every 3] [--pruning 100,-10,-6 …]

A pruning is the width of the beam, the log mass below the best prefix's at which a prefix is
dropped, and the log probability below which a token begins no edge. The weight of the language
model is chosen for each of them, on the speakers of one half and applied to the other, both ways
round; the time is the search's alone, on one thread, with the weight that is best on all.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from service.bundle import find_bundle, load_bundle
from service.decoding.ngram import load_ngram
from service.errors import InputError
from service.recogniser import make_beam_decoder
from service.scoring import ErrorCounts
from service.tuning import (
    Item,
    Weights,
    cross_fit,
    describe_errors,
    find_lowest,
    read_items,
    search_items,
)
from training.precision import processor_name


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--every", type=int, default=1, help="take every n-th utterance")
    parser.add_argument(
        "--pruning",
        nargs="+",
        default=["100,-10,-6", "200,-10,-7", "300,-10,-8", "500,-12,-8", "1000,-14,-9"],
    )
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.8, 0.9, 1.0, 1.1])
    options = parser.parse_args()
    folder = find_bundle(options.bundle)
    bundle = load_bundle(folder)
    if bundle.ngram is None or not bundle.has_lexicon:
        raise InputError(f"{folder} has no language model over phones; there is nothing to prune")
    lm, lexicon = load_ngram(bundle.ngram), bundle.read_lexicon()
    items = read_items(folder, options.manifest)[:: options.every]
    audio_s = sum(len(item.emissions["phones"]) for item in items) * bundle.config.frame_s
    print(f"{processor_name()}; {len(items)} utterances, {audio_s:.0f} s")
    wanted = bundle.config.decoding.of("phones")
    for pruning in options.pruning:
        beam_width, beam_prune, token_min = (float(part) for part in pruning.split(","))
        counts: dict[Weights, list[ErrorCounts]] = {}
        seconds: dict[Weights, float] = {}
        for alpha in options.alphas:
            changes = {
                "beam_width": int(beam_width),
                "beam_prune_log_prob": beam_prune,
                "token_min_log_prob": token_min,
                "alpha": alpha,
            }
            settings = wanted.model_copy(update=changes)
            decoder = make_beam_decoder(bundle, lm, "phones", settings, lexicon=lexicon)
            decoder.decode(items[0].emissions["phones"])  # compiles
            weights = alpha, settings.beta
            start = time.process_time()
            counts[weights] = search_items(decoder, items, "phones")
            seconds[weights] = time.process_time() - start
        report(pruning, items, counts, {w: s / audio_s for w, s in seconds.items()})


def report(
    pruning: str,
    items: Sequence[Item],
    counts: Mapping[Weights, Sequence[ErrorCounts]],
    factors: Mapping[Weights, float],
) -> None:
    """Print a line."""
    best = find_lowest(counts, np.ones(len(items), np.bool_))
    fitted = cross_fit(
        items, lambda half: find_lowest(counts, half), lambda weights, i: counts[weights][i]
    )
    errors = ", ".join(f"{name} {text}" for name, text in describe_errors(items, fitted).items())
    print(f"{pruning}: alpha {best[0]}, {errors}; real-time factor {factors[best]:.4f}", flush=True)


if __name__ == "__main__":
    main()
