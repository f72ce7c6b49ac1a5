"""Fit how likely interim words survive, and measure how often committed words change.

python benchmarks/fit_stability.py DEV.jsonl survival.json [--bundle DIR]

Every utterance is streamed; each interim word is marked by whether the final result has it. The
logistic regressions are fitted on one half of the speakers and measured on the other, both ways
round; what is written is fitted on all. `voxgate export --survival survival.json` takes it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product
from pathlib import Path
from typing import Final

import jiwer
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from service.audio import load_audio, to_pcm
from service.bundle import Survival, find_bundle
from service.decoding.hypothesis import Word
from service.endpointing import EndpointSettings
from service.features import log_mel
from service.manifest import Utterance, read_manifest
from service.recogniser import DecoderName, FloatArray, Recogniser, TimedWord, load_recogniser
from service.request import StreamRequest
from service.segmenter import Settled, UtteranceEnded
from service.segmenter import Utterance as Stretch
from service.session import Session, Update
from service.stability import survival_inputs

FAMILIES: Final = ("greedy", "beam")
_N_STEPS: Final = 30
_RIDGE: Final = 1.0
_N_BINS: Final = 10
_PIECE_BYTES: Final = 3_200
COMMITTED_STABILITY: Final = 0.9


@dataclass(frozen=True)
class Kind:
    """A kind of final result."""

    family: str
    """`greedy`, or `beam` for the most accurate decoder of the bundle."""
    second_pass: bool

    @property
    def name(self) -> str:
        """Its key in the bundle."""
        return f"{self.family}+second-pass" if self.second_pass else self.family


@dataclass(frozen=True)
class Interim:
    """One interim reading of a stretch."""

    words: Mapping[str, Sequence[Word]]
    """As the decoder of each family reads it."""
    n_settled: int
    n_known: int


@dataclass
class Changes:
    """What became of the interim results of sessions."""

    n_words: int = 0
    """Words of the final results."""
    n_committed: int = 0
    """Words that were committed before the final result."""
    n_changed: int = 0
    """Those of them that the final result changed."""
    stabilities: list[float] = field(default_factory=list)
    """Of every tail."""
    tails_survived: list[bool] = field(default_factory=list)
    """Whether the final result has every word of the tail."""

    def count(
        self, recogniser: Recogniser, utterances: Iterable[Utterance], kind: Kind, *, profile: str
    ) -> None:
        """Stream recordings and count."""
        for utterance in tqdm(utterances, unit="utterance"):
            waveform = load_audio(utterance.audio_path, target_rate=recogniser.sample_rate)
            pcm = to_pcm(waveform)
            session = Session(
                recogniser,
                StreamRequest(profile=profile, second_pass=kind.second_pass, interim_results=True),
                decoder=decoder_of(kind.family, recogniser),
            )
            pieces = (pcm[i : i + _PIECE_BYTES] for i in range(0, len(pcm), _PIECE_BYTES))
            updates = [update for piece in pieces for update in session.push(piece)]
            self._count_updates([*updates, *session.finish()])

    def _count_updates(self, updates: Iterable[Update]) -> None:
        committed: list[TimedWord] = []
        tails: list[tuple[list[str], list[str], float]] = []
        for update in updates:
            for result in update.results:
                timed = result.segment.alternatives[0].words
                words = [word.text for word in timed]
                if result.is_final:
                    final = " ".join(words)
                    end_s = result.segment.end_s
                    ended = [word.text for word in committed if word.start_s < end_s]
                    self.n_words += len(words)
                    self.n_committed += len(ended)
                    self.n_changed += find_survivors(ended, final).count(False)
                    for before, tail, stability in tails:
                        stays = find_survivors([*before, *tail], final)
                        self.stabilities.append(stability)
                        self.tails_survived.append(all(stays[len(before) :]))
                    committed = [word for word in committed if word.start_s >= end_s]
                    tails = []
                elif result.stability >= COMMITTED_STABILITY:
                    committed = list(timed)
                else:
                    before = [word.text for word in committed]
                    tails.append((before, words, result.stability))

    def __str__(self) -> str:
        error = calibration_error(np.array(self.stabilities), np.array(self.tails_survived))
        return (
            f"  {self.n_committed} of {self.n_words} final words "
            f"({self.n_committed / self.n_words:.1%}) committed early, {self.n_changed} "
            f"({self.n_changed / max(1, self.n_committed):.1%}) of them changed by the final\n"
            f"  {len(self.stabilities)} tails, {np.mean(self.tails_survived):.1%} survive whole, "
            f"calibration error of their stability {error:.3f}"
        )


def decoder_of(family: str, recogniser: Recogniser) -> DecoderName:
    """What reads the results of a family."""
    return "greedy" if family == "greedy" else recogniser.best_decoder


KINDS: Final = tuple(Kind(d, s) for d, s in product(FAMILIES, (True, False)))


def main() -> None:
    """Fit, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--profile", default="balanced")
    arguments = parser.parse_args()
    recogniser = load_recogniser(find_bundle(arguments.bundle))
    utterances = read_manifest(arguments.manifest)
    speakers = sorted({(u.corpus, u.speaker) for u in utterances})
    halves = [
        [u for u in utterances if (u.corpus, u.speaker) in set(speakers[first::2])]
        for first in (0, 1)
    ]
    samples = [collect(recogniser, half, profile=arguments.profile) for half in halves]
    for kind in KINDS:
        weights = [fit(*samples[1 - half][kind]) for half in (0, 1)]
        predicted = np.concatenate([predict(weights[h], samples[h][kind][0]) for h in (0, 1)])
        survived = np.concatenate([samples[h][kind][1] for h in (0, 1)])
        print(f"{kind.name}: {len(survived)} interim words, {survived.mean():.1%} survive, ")
        print(f"  calibration error {calibration_error(predicted, survived):.3f}")
        changes = Changes()
        for half in (0, 1):
            fitted = replace(recogniser, survival={kind.name: weights[half]})
            changes.count(fitted, halves[half], kind, profile=arguments.profile)
        print(changes)
    pooled = {
        kind.name: fit(*map(np.concatenate, zip(*(s[kind] for s in samples), strict=True)))
        for kind in KINDS
    }
    text = json.dumps({name: weights.model_dump() for name, weights in pooled.items()}, indent=2)
    arguments.output.write_text(text + "\n", encoding="utf-8")


Samples = tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]


def collect(
    recogniser: Recogniser, utterances: Iterable[Utterance], *, profile: str
) -> dict[Kind, Samples]:
    """What each interim word is judged by, (word, input), and whether it survived, (word,)."""
    inputs: dict[Kind, list[tuple[float, ...]]] = {kind: [] for kind in KINDS}
    survived: dict[Kind, list[bool]] = {kind: [] for kind in KINDS}
    for utterance in tqdm(utterances, unit="utterance"):
        for stretch, interims in stream(recogniser, utterance, profile=profile):
            whole = recogniser.emission(stretch.features)
            for kind in KINDS:
                emission = whole if kind.second_pass else stretch.log_probs
                decoder = decoder_of(kind.family, recogniser)
                segment = recogniser.segment(emission, first_frame=0, decoder=decoder)
                final = segment.alternatives[0].transcript
                for interim in interims:
                    words = interim.words[kind.family]
                    stays = find_survivors([word.text for word in words], final)
                    for word, stay in zip(words, stays, strict=True):
                        inputs[kind].append(
                            survival_inputs(
                                word, n_settled=interim.n_settled, n_known=interim.n_known
                            )
                        )
                        survived[kind].append(stay)
    return {kind: (np.array(inputs[kind]), np.array(survived[kind])) for kind in KINDS}


def stream(
    recogniser: Recogniser, utterance: Utterance, *, profile: str
) -> Iterable[tuple[Stretch, list[Interim]]]:
    """The stretches of one recording and the interim readings of each."""
    waveform = load_audio(utterance.audio_path, target_rate=recogniser.sample_rate)
    segmenter = recogniser.open_segmenter(profile, EndpointSettings(), "greedy")
    interims: list[Interim] = []
    features = log_mel(waveform, recogniser.features)
    for event in chain(segmenter.push(features), segmenter.finish()):
        if isinstance(event, Settled):
            log_probs = segmenter.log_probs()
            words = {
                family: read_running(recogniser, log_probs, decoder_of(family, recogniser))
                for family in FAMILIES
            }
            interims.append(Interim(words, segmenter.n_settled, len(log_probs)))
        elif isinstance(event, UtteranceEnded):
            yield event.utterance, interims
            interims = []


def read_running(
    recogniser: Recogniser, log_probs: FloatArray, name: DecoderName
) -> Sequence[Word]:
    """The words of a running utterance as a session reads them."""
    decoder, searched = recogniser.decoder(name), log_probs[:, recogniser.columns(name)]
    search = decoder.open()
    if search is None:
        return decoder.decode(searched)[0].words
    return search.read(searched, n_settled=0).words


def find_survivors(words: Sequence[str], final: str) -> list[bool]:
    """Which words of an interim reading the final one has at their place."""
    stays = [False] * len(words)
    if words:
        for chunk in jiwer.process_words(" ".join(words), final or "-").alignments[0]:
            if chunk.type == "equal":
                stays[chunk.ref_start_idx : chunk.ref_end_idx] = [True] * (
                    chunk.ref_end_idx - chunk.ref_start_idx
                )
    return stays


def fit(inputs: npt.NDArray[np.float64], survived: npt.NDArray[np.bool_]) -> Survival:
    """Logistic regression with a light ridge, by Newton's method."""
    weights = np.zeros(inputs.shape[1])
    penalty = _RIDGE * np.diag([0.0] + [1.0] * (inputs.shape[1] - 1))
    for _ in range(_N_STEPS):
        p = 1 / (1 + np.exp(-inputs @ weights))
        gradient = inputs.T @ (p - survived) + penalty @ weights
        hessian = inputs.T @ (inputs * (p * (1 - p))[:, None]) + penalty
        weights -= np.linalg.solve(hessian, gradient)
    names = list(Survival.model_fields)
    return Survival(**{n: round(float(w), 4) for n, w in zip(names, weights, strict=True)})


def predict(weights: Survival, inputs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Probability of each word, (word,)."""
    log_odds = inputs @ np.array(list(weights.model_dump().values()))
    return np.asarray(1 / (1 + np.exp(-log_odds)))


def calibration_error(predicted: npt.NDArray[np.float64], survived: npt.NDArray[np.bool_]) -> float:
    """Mean distance between probability and frequency over bins of equal width."""
    bins = np.minimum((predicted * _N_BINS).astype(int), _N_BINS - 1)
    errors = [
        abs(predicted[bins == b].mean() - survived[bins == b].mean()) * (bins == b).mean()
        for b in np.unique(bins)
    ]
    return float(sum(errors))


if __name__ == "__main__":
    main()
