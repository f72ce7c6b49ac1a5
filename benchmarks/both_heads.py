"""What the character head adds to a search over phones: its score of each reading, weighted.

python benchmarks/both_heads.py DEV.jsonl [--bundle DIR] [--n-best 100]

The search over phones gives the best readings of each utterance. To the scores that rank them
(search, recurrent model, n-gram, words; see `rescoring.py`) comes a weight times the natural log
probability that the character head gives to the reading's spelling, summed over all alignments. All
weights are chosen on the speakers of one half and applied to the other, both ways round.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import ctc_loss
from tqdm import tqdm

from service.bundle import find_bundle, load_bundle
from service.decoding.hypothesis import FloatArray
from service.decoding.ngram import load_ngram
from service.errors import InputError
from service.recogniser import make_beam_decoder
from service.rescorer import Rescorer
from service.scoring import ErrorCounts, pool
from service.text import BLANK, encode
from service.tuning import (
    Item,
    ReadingList,
    RescoringWeights,
    choose_rescoring,
    cross_fit,
    describe_errors,
    read_items,
    score_readings,
)

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
_LEAST = -1e4


def main() -> None:
    """Score the readings by both heads and print what that is worth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--n-best", type=int, default=100)
    options = parser.parse_args()
    folder = find_bundle(options.bundle)
    bundle = load_bundle(folder)
    if bundle.ngram is None or bundle.rescorer_graph is None or not bundle.has_lexicon:
        raise InputError(f"{folder} lacks a language model, a rescorer or a lexicon; it needs all")
    lm = load_ngram(bundle.ngram)
    rescorer = Rescorer(bundle.rescorer_graph)
    decoder = make_beam_decoder(bundle, lm, "phones", bundle.config.decoding.of("phones"))
    items = read_items(folder, options.manifest)
    lists, spelled = [], []
    for item in tqdm(items, "searching"):
        found = decoder.decode(item.emissions["phones"], n_best=options.n_best)
        lists.append(score_readings(item, found, rescorer, lm))
        texts = [reading.text for reading in found]
        spelled.append(spell(item.emissions["characters"], texts, bundle.config.tokens))
    for name, weights in (("phones alone", WEIGHTS[:1]), ("both heads", WEIGHTS)):
        counts = fit(items, lists, spelled, weights)
        rates = describe_errors(items, counts)
        print(f"{name}: " + ", ".join(f"{corpus} {rate}" for corpus, rate in rates.items()))


def spell(
    log_probs: FloatArray, texts: Sequence[str], tokens: Sequence[str]
) -> npt.NDArray[np.float64]:
    """What the character head says of texts: log probabilities, float64, (text,)."""
    labels = [torch.tensor(encode(text, tokens), dtype=torch.int64) for text in texts]
    lengths = torch.tensor([len(label) for label in labels])
    padded = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True)
    scores = torch.from_numpy(log_probs).unsqueeze(1).expand(-1, len(texts), -1)
    frames = torch.full((len(texts),), len(log_probs))
    losses = ctc_loss(scores, padded, frames, lengths, blank=BLANK, reduction="none")
    return np.maximum(-losses.double().numpy(), _LEAST)  # not infinite where letters do not fit


def fit(
    items: Sequence[Item],
    lists: Sequence[ReadingList],
    spelled: Sequence[npt.NDArray[np.float64]],
    weights: Sequence[float],
) -> list[ErrorCounts]:
    """Errors of each utterance with the weights that the other half of the speakers chose."""
    by_weight = {
        weight: [
            replace(found, searched=found.searched + weight * scores)
            for found, scores in zip(lists, spelled, strict=True)
        ]
        for weight in weights
    }

    def choose(half: npt.NDArray[np.bool_]) -> tuple[float, RescoringWeights]:
        best: list[tuple[float, float, RescoringWeights]] = []
        for weight, scored in by_weight.items():
            among = [scored[i] for i in np.flatnonzero(half)]
            chosen = choose_rescoring(among)
            best.append((pool(found.choose(chosen) for found in among).wer, weight, chosen))
        _, weight, chosen = min(best)
        print(f"one half of the speakers chooses {weight:g} for characters, {chosen} for the rest")
        return weight, chosen

    return cross_fit(items, choose, lambda both, i: by_weight[both[0]][i].choose(both[1]))


if __name__ == "__main__":
    main()
