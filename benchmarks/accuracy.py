"""Word error rates of bundles by corpus, condition and decoder, with intervals by speaker.

python benchmarks/accuracy.py DEV.jsonl [--bundle DIR …] [--conditions clean babble telephone]

The weights of the search (alpha, beta around the bundle's) and of the second pass are chosen on the
clean recordings of one half of the speakers and scored on the other half, both ways round. Greedy
has nothing to choose. With the bundle of `voxgate export --no-int8` beside the shipped one, the
table shows what int8 costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from conditions import CONDITIONS
from tqdm import tqdm

from service.bundle import find_bundle, load_bundle
from service.decoding.ngram import load_ngram
from service.recogniser import make_beam_decoder
from service.rescorer import Rescorer
from service.scoring import ErrorCounts, count_errors
from service.text import collapse, decode
from service.tuning import (
    ReadingList,
    Weights,
    choose_rescoring,
    cross_fit,
    describe_errors,
    find_lowest,
    read_items,
    score_readings,
    search_items,
)

STEPS = ((-0.1, 0.0, 0.1), (-0.5, 0.0, 0.5))
"""What is tried around the bundle's alpha and beta."""


def main() -> None:
    """Print a table of each bundle."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--bundle", type=Path, action="append")
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    options = parser.parse_args()
    for folder in options.bundle or [find_bundle(None)]:
        print(f"\n{folder}\n\n| | | greedy | beam | rescored |\n| --- | --- | --- | --- | --- |")
        measure(folder, options.manifest, options.conditions)


def measure(folder: Path, manifest: Path, conditions: Sequence[str]) -> None:
    """Print the lines of a bundle's table; what is chosen is chosen on clean recordings."""
    bundle = load_bundle(folder)
    assert bundle.ngram is not None
    assert bundle.rescorer_graph is not None
    lm, rescorer = load_ngram(bundle.ngram), Rescorer(bundle.rescorer_graph)
    head = bundle.config.decoding.search_tokens
    shipped = bundle.config.decoding.of(head)
    decoders = {}
    for alpha, beta in product(*STEPS):
        weights = round(shipped.alpha + alpha, 6), round(shipped.beta + beta, 6)
        settings = shipped.model_copy(update={"alpha": weights[0], "beta": weights[1]})
        decoders[weights] = make_beam_decoder(bundle, lm, head, settings)
    best = decoders[shipped.alpha, shipped.beta]
    second_pass = bundle.config.decoding.rescoring
    clean: tuple[dict[Weights, list[ErrorCounts]], list[ReadingList]] | None = None
    for condition in ["clean", *(c for c in conditions if c != "clean")]:
        items = read_items(folder, manifest, change=CONDITIONS[condition])
        tokens = bundle.config.tokens
        greedy = [
            count_errors([item.reference], [decode(collapse(path), tokens)])
            for item in items
            for path in [item.emissions["characters"].argmax(-1).tolist()]
        ]
        counts = {
            weights: search_items(decoder, items, head)
            for weights, decoder in tqdm(decoders.items(), f"{condition}, search", leave=False)
        }
        lists = [
            score_readings(
                item,
                best.decode(item.emissions[head], n_best=second_pass.n_best),
                rescorer,
                lm,
                margin=second_pass.margin,
            )
            for item in tqdm(items, f"{condition}, second pass", leave=False)
        ]
        clean = clean or (counts, lists)
        chosen_on, ranked_on = clean
        searched = cross_fit(
            items,
            lambda half: find_lowest(chosen_on, half),  # noqa: B023  # called at once
            lambda weights, i: counts[weights][i],  # noqa: B023
        )
        rescored = cross_fit(
            items,
            lambda half: choose_rescoring([ranked_on[i] for i in np.flatnonzero(half)]),  # noqa: B023
            lambda weights, i: lists[i].choose(weights),  # noqa: B023
        )
        table = [describe_errors(items, errors) for errors in (greedy, searched, rescored)]
        for corpus in table[0]:
            cells = " | ".join(rates[corpus] for rates in table)
            print(f"| {condition} | {corpus} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
