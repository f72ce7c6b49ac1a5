"""Fits the language model's weight and the word bonus of a bundle on a development manifest.

The speakers are split into two halves. Weights are chosen on each half and scored on the other;
the pooled error rate of both is what may be reported. The weights to ship are then chosen on all.

    python benchmarks/fit_decoder.py dev.jsonl --bundle bundles/en-small
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tqdm import tqdm

from service.audio import load_audio
from service.bundle import DecoderSettings, find_bundle, load_bundle
from service.decoding.hypothesis import FloatArray
from service.decoding.reference import ReferenceDecoder
from service.features import log_mel
from service.manifest import read_manifest
from service.recogniser import Recogniser, load_recogniser
from service.scoring import ErrorCounts, count_errors, pool

Weights = tuple[float, float]
Counts = Mapping[tuple[str, str], ErrorCounts]
"""Errors by (corpus, speaker)."""


@dataclass(frozen=True)
class Item:
    """One development utterance, ready to be searched."""

    corpus: str
    speaker: str
    reference: str
    emission: FloatArray
    """log_probs, float32, (frames, token)."""


def main() -> None:
    """Read arguments, search every pair of weights, print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--alphas", default="0.3,0.5,0.7,0.9")
    parser.add_argument("--betas", default="0,1,2,3")
    parser.add_argument("--corpus", help="search this corpus of the manifest only")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another decoder setting, such as token_min_log_prob=-7",
    )
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    folder = find_bundle(arguments.bundle)
    recogniser = load_recogniser(folder, decoders=("greedy",))
    items = compute_emissions(recogniser, arguments.manifest, corpus=arguments.corpus)
    others = {name: float(value) for name, value in (pair.split("=") for pair in arguments.set)}
    grid = list(product(_numbers(arguments.alphas), _numbers(arguments.betas)))
    search = functools.partial(search_items, folder, items, others)
    with multiprocessing.get_context("fork").Pool(arguments.jobs) as processes:
        found = list(tqdm(processes.imap(search, grid), total=len(grid), desc="weights"))
    report(dict(zip(grid, found, strict=True)))


def compute_emissions(recogniser: Recogniser, manifest: Path, *, corpus: str | None) -> list[Item]:
    """Run the acoustic model over the utterances of a manifest, or of one corpus of it."""
    items = []
    utterances = [u for u in read_manifest(manifest) if corpus in (None, u.corpus)]
    for utterance in tqdm(utterances, desc="emissions"):
        waveform = load_audio(utterance.audio_path, target_rate=recogniser.sample_rate)
        features = log_mel(waveform, recogniser.features)
        emission = recogniser.emission(features)
        items.append(Item(utterance.corpus, utterance.speaker, utterance.text or "", emission))
    return items


def search_items(
    folder: Path, items: Sequence[Item], others: Mapping[str, float], weights: Weights
) -> Counts:
    """Decode every utterance with one pair of weights and other decoder settings."""
    bundle = load_bundle(folder)
    alpha, beta = weights
    changed = {**bundle.config.decoder.model_dump(), **others, "alpha": alpha, "beta": beta}
    settings = DecoderSettings.model_validate(changed).model_dump()
    decoder = ReferenceDecoder(
        bundle.config.tokens, lm_path=bundle.lm_binary, words=bundle.read_words(), **settings
    )
    counts: dict[tuple[str, str], ErrorCounts] = defaultdict(ErrorCounts)
    for item in items:
        text = decoder.decode(item.emission)[0].text
        counts[item.corpus, item.speaker] += count_errors([item.reference], [text])
    return dict(counts)


def report(found: Mapping[Weights, Counts]) -> None:
    """Print the error rate of every pair, the cross-fitted one, and the weights to ship."""
    keys = sorted(next(iter(found.values())))
    halves = [keys[0::2], keys[1::2]]
    for weights, counts in found.items():
        print(f"alpha {weights[0]:.2f} beta {weights[1]:.2f}: WER {_wer(counts, keys):.2%}")
    held_out: dict[tuple[str, str], ErrorCounts] = {}
    for fitted_on, scored_on in (halves, halves[::-1]):
        best = _best(found, fitted_on)
        held_out |= {key: found[best][key] for key in scored_on}
        print(f"one half chooses alpha {best[0]:.2f} beta {best[1]:.2f}")
    for corpus in sorted({corpus for corpus, _ in keys}):
        counts_of = [count for (name, _), count in held_out.items() if name == corpus]
        print(f"cross-fitted WER {pool(counts_of).wer:.2%} CER {pool(counts_of).cer:.2%}  {corpus}")
    print(f"cross-fitted WER {_wer(held_out, keys):.2%}  all")
    best = _best(found, keys)
    print(f"to ship: alpha {best[0]:.2f} beta {best[1]:.2f}")


def _best(found: Mapping[Weights, Counts], keys: Sequence[tuple[str, str]]) -> Weights:
    return min(found, key=lambda weights: _wer(found[weights], keys))


def _wer(counts: Counts, keys: Sequence[tuple[str, str]]) -> float:
    return pool(counts[key] for key in keys).wer


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
