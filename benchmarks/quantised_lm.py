"""What a byte for each log probability and back-off of the language model costs.

python benchmarks/quantised_lm.py DEV.jsonl LM.arpa.gz [--bundle DIR]

Both forms are compiled from the same ARPA file (`voxgate lm build --arpa` wrote it). Every word of
the development texts is scored after the words before it, and the development set is searched with
both, by the bundle's settings.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt

from service.bundle import find_bundle, load_bundle
from service.decoding.ngram import NgramModel
from service.processors import count_usable_processors
from service.recogniser import make_beam_decoder
from service.scoring import pool
from service.tuning import read_items, search_items
from training.arpa import compile_arpa


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("arpa", type=Path)
    parser.add_argument("--bundle", type=Path)
    arguments = parser.parse_args()
    folder = find_bundle(arguments.bundle)
    bundle = load_bundle(folder)
    items = read_items(folder, arguments.manifest)
    whole = compile_arpa(arguments.arpa)
    quantised = compile_arpa(arguments.arpa, quantise=True)
    texts = [item.reference.split() for item in items]
    difference = np.abs(_scores(whole, texts) - _scores(quantised, texts))
    print(
        f"{len(difference):,} scores, log10: they differ by {difference.max():.4f} at most, "
        f"{difference.mean():.4f} on average"
    )
    head = bundle.config.decoding.search_tokens
    settings = bundle.config.decoding.of(head)
    for name, lm in (("float32", whole), ("quantised", quantised)):
        decoder = make_beam_decoder(bundle, lm, head, settings)
        counts = search_items(decoder, items, head, n_threads=count_usable_processors())
        print(f"{name}: WER {pool(counts).wer:.2%} over {head}")


def _scores(lm: NgramModel, texts: list[list[str]]) -> npt.NDArray[np.float64]:
    return np.concatenate([lm.score(words) for words in texts])


if __name__ == "__main__":
    main()
