"""Fits the weights of the beam searches and their confidences on a development manifest.

The speakers are split into two halves. Whatever is chosen on one half is scored on the other, both
ways round, and the pooled figure is what may be reported; what ships is chosen on all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final, TypeVar

import jiwer
import numpy as np
import numpy.typing as npt
from rich.progress import track

from service.audio import load_audio
from service.bundle import (
    Bundle,
    Confidence,
    DecoderSettings,
    DecodingSettings,
    SearchTokens,
    load_bundle,
)
from service.decoding.beam import LOWEST_PEAK, WORD_FEATURES, BeamDecoder
from service.decoding.hypothesis import FloatArray, Hypothesis
from service.decoding.ngram import NgramModel, load_ngram
from service.errors import InputError, MissingExtraError
from service.evaluation import Evaluation
from service.features import log_mel
from service.manifest import read_manifest
from service.recogniser import load_recogniser, make_beam_decoder
from service.rescorer import Rescorer
from service.rescoring import count_near, describe_readings
from service.scoring import ErrorCounts, count_errors, format_interval, pool

DoubleArray = npt.NDArray[np.float64]
W = TypeVar("W")
Weights = tuple[float, float]
"""Weight of the language model and score of a word."""
RescoringWeights = tuple[float, float, float]
"""Of the recurrent model, of the n-gram, of a word; all natural log."""
Counts = Sequence[ErrorCounts]
"""Errors by utterance."""

_RESCORING_GRID: Final = (
    tuple(np.round(np.arange(0.0, 1.55, 0.1), 2).tolist()),
    tuple(np.round(np.arange(-0.8, 0.25, 0.1), 2).tolist()),
    (-2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5),
)
_RIDGE: Final = 1.0  # on standardised features
_NEWTON_STEPS: Final = 30
_LEAST: Final = 1e-4


@dataclass(frozen=True)
class Item:
    """One development utterance, ready to be searched."""

    speaker: str
    corpus: str
    reference: str
    emissions: Mapping[SearchTokens, FloatArray]
    """log_probs of each head, float32, (frames, token)."""


@dataclass(frozen=True)
class ConfidenceFigures:
    """How much confidences say, held out."""

    nce: float
    """Normalised cross entropy: the share of the uncertainty they take away."""
    ece: float
    """Expected calibration error, over ten bins of equal size."""
    auc: float
    """Probability that a right word has more confidence than a wrong one."""
    max_probability_auc: float = float("nan")
    """The same of the plain measure: the least of the word's tokens' highest probabilities."""


def tune_bundle(
    folder: Path,
    manifest: Path,
    *,
    alphas: Sequence[float],
    betas: Sequence[float],
    n_threads: int = 1,
    plot: Path | None = None,
    on_line: Callable[[str], object] = print,
) -> DecodingSettings:
    """Fit a bundle's decoders.

    Args:
        folder: the bundle.
        manifest: development data with speakers.
        alphas: weights of the language model to try.
        betas: word scores to try.
        n_threads: searches that run at the same time.
        plot: PNG that gets a heat map of each search's error rates.
        on_line: gets what is found, line by line.

    Returns:
        The bundle's settings with the weights and confidences that do best.

    Raises:
        BundleError: the bundle cannot be read.
        InputError: it has no language model, or the manifest fewer than two speakers.
        MissingExtraError: a plot is wanted and matplotlib is missing.
    """
    if plot is not None:
        _find_figure()  # before the long work
    bundle = load_bundle(folder)
    if bundle.ngram is None:
        raise InputError(f"{folder} has no language model whose weight could be fitted")
    lm = load_ngram(bundle.ngram)
    items = read_items(folder, manifest)
    if len({item.speaker for item in items}) < 2:
        raise InputError(f"{manifest} has one speaker; expected at least two, to hold one out")
    settings = bundle.config.decoding
    heads: list[SearchTokens] = ["characters", "phones"] if bundle.has_lexicon else ["characters"]
    grid = list(product(alphas, betas))
    rates: dict[SearchTokens, float] = {}
    maps: dict[SearchTokens, dict[Weights, float]] = {}
    for head in heads:
        counts = {}
        for alpha, beta in track(grid, f"searching {head}"):
            wanted = settings.of(head).model_copy(update={"alpha": alpha, "beta": beta})
            decoder = make_beam_decoder(bundle, lm, head, wanted)
            counts[alpha, beta] = search_items(decoder, items, head, n_threads=n_threads)
        maps[head] = {weights: pool(found).wer for weights, found in counts.items()}
        rates[head] = _report(head, counts, items, on_line)
        best = min(maps[head], key=maps[head].__getitem__)
        fitted = settings.of(head).model_copy(update={"alpha": best[0], "beta": best[1]})
        confidence, figures = fit_confidence(bundle, lm, head, fitted, items)
        on_line(
            f"{head}: confidence, cross-fitted: NCE {figures.nce:.3f}, ECE {figures.ece:.3f}, "
            f"AUC {figures.auc:.3f} (of the lowest token probability alone "
            f"{figures.max_probability_auc:.3f})"
        )
        fitted = fitted.model_copy(update={"confidence": confidence})
        settings = settings.model_copy(update={head: fitted})
    better = min(rates, key=rates.__getitem__)
    on_line(f"beam searches {better}")
    if bundle.rescorer_graph is not None:
        decoder = make_beam_decoder(bundle, lm, better, settings.of(better))
        rescorer = Rescorer(bundle.rescorer_graph)
        second_pass = settings.rescoring
        lists = []
        for item in track(items, "rescoring"):
            found = decoder.decode(item.emissions[better], n_best=second_pass.n_best)
            lists.append(score_readings(item, found, rescorer, lm, margin=second_pass.margin))
        second_pass = second_pass.model_copy(update=fit_rescoring(items, lists, on_line))
        settings = settings.model_copy(update={"rescoring": second_pass})
    if plot is not None:
        draw_maps(maps, plot)
    return settings.model_copy(update={"search_tokens": better})


def read_items(
    folder: Path,
    manifest: Path,
    *,
    change: Callable[[list[FloatArray]], Iterable[FloatArray]] | None = None,
) -> list[Item]:
    """Run the acoustic model with full context over the utterances of a manifest.

    Args:
        folder: the bundle.
        manifest: development data.
        change: what the waveforms, float32, (samples,), are put through before.
    """
    recogniser = load_recogniser(folder, decoders=("greedy",))
    n_tokens = len(recogniser.tokens)
    utterances = read_manifest(manifest)
    waveforms: Iterable[FloatArray] = (
        load_audio(utterance.audio_path, target_rate=recogniser.sample_rate)
        for utterance in utterances
    )
    if change is not None:
        waveforms = change(list(waveforms))
    items = []
    paired = zip(utterances, waveforms, strict=True)
    for utterance, waveform in track(paired, "emissions", total=len(utterances)):
        emission = recogniser.emission(log_mel(waveform, recogniser.features))
        heads: dict[SearchTokens, FloatArray] = {
            "characters": emission[:, :n_tokens],
            "phones": emission[:, n_tokens:],
        }
        items.append(Item(utterance.speaker, utterance.corpus, utterance.text or "", heads))
    return items


def search_items(
    decoder: BeamDecoder, items: Sequence[Item], head: SearchTokens, *, n_threads: int = 1
) -> list[ErrorCounts]:
    """Errors of the best reading of every utterance."""

    def search(item: Item) -> ErrorCounts:
        (best,) = decoder.decode(item.emissions[head])
        return count_errors([item.reference], [best.text])

    with ThreadPoolExecutor(n_threads) as pool_of_threads:
        return list(pool_of_threads.map(search, items))


@dataclass(frozen=True)
class ReadingList:
    """What the search found of one utterance, and what the second pass weighs."""

    errors: list[ErrorCounts]
    """Of each reading, best first as the search has it."""
    searched: DoubleArray
    """The search's scores, float64, (reading,)."""
    features: DoubleArray
    """What the weights multiply, float64, (reading, 3)."""

    def choose(self, weights: RescoringWeights) -> ErrorCounts:
        """Errors of the best reading by these weights; the first of equal ones."""
        return self.errors[int(np.argmax(self.searched + self.features @ np.array(weights)))]

    def find_best(self) -> ErrorCounts:
        """Errors of the reading that has the fewest."""
        return min(self.errors, key=lambda counts: counts.n_errors)


def score_readings(
    item: Item,
    found: Sequence[Hypothesis],
    rescorer: Rescorer,
    lm: NgramModel,
    *,
    margin: float = math.inf,
) -> ReadingList:
    """Errors and scores of the readings of an utterance, best first, that are ranked anew."""
    scores = np.array([reading.score for reading in found])
    found = found[: count_near(scores, margin)]
    return ReadingList(
        errors=[count_errors([item.reference], [reading.text]) for reading in found],
        searched=scores[: len(found)],
        features=describe_readings([reading.text.split() for reading in found], rescorer, lm),
    )


def fit_rescoring(
    items: Sequence[Item], lists: Sequence[ReadingList], on_line: Callable[[str], object] = print
) -> dict[str, float]:
    """Fit the weights of the second pass; say what they are worth, cross-fitted.

    Returns:
        The fields of `RescoringSettings` that all speakers choose.
    """
    rescored = cross_fit(
        items,
        lambda half: choose_rescoring([lists[i] for i in np.flatnonzero(half)]),
        lambda weights, i: lists[i].choose(weights),
    )
    before = describe_errors(items, [found.errors[0] for found in lists])
    oracle = describe_errors(items, [found.find_best() for found in lists])
    for corpus, rate in describe_errors(items, rescored).items():
        on_line(
            f"rescored: cross-fitted WER {rate} on {corpus}; "
            f"before {before[corpus]}, oracle {oracle[corpus]}"
        )
    recurrent, ngram, word = choose_rescoring(lists)
    on_line(f"rescored: to ship recurrent {recurrent:g}, n-gram {ngram:g}, word {word:g}")
    return {"recurrent_weight": recurrent, "ngram_weight": ngram, "word_score": word}


def choose_rescoring(lists: Sequence[ReadingList]) -> RescoringWeights:
    """The weights of the grid that give the fewest word errors; the smallest of equal ones."""
    grid: list[RescoringWeights] = sorted(product(*_RESCORING_GRID), key=lambda w: sum(map(abs, w)))
    n_errors = np.zeros(len(grid), np.int64)
    for found in lists:
        totals = found.searched[:, None] + found.features @ np.array(grid).T  # (reading, weights)
        n_errors += np.array([e.n_errors for e in found.errors])[totals.argmax(axis=0)]
    return grid[int(n_errors.argmin())]


def cross_fit(
    items: Sequence[Item],
    fit: Callable[[npt.NDArray[np.bool_]], W],
    count: Callable[[W, int], ErrorCounts],
) -> list[ErrorCounts]:
    """Errors of every utterance with what the speakers of the other half chose.

    Args:
        items: the utterances.
        fit: chooses on some of them, bool, (items,).
        count: errors of an utterance by what was chosen.
    """
    in_first = halves_of(items)
    chosen = {half: fit(in_first == half) for half in (True, False)}
    return [count(chosen[not first], i) for i, first in enumerate(in_first.tolist())]


def find_lowest(counts: Mapping[Weights, Counts], among: npt.NDArray[np.bool_]) -> Weights:
    """The weights that make the fewest errors in some utterances, bool, (items,)."""
    return min(counts, key=lambda weights: pool(_where(counts[weights], among)).wer)


def describe_errors(items: Sequence[Item], counts: Counts) -> dict[str, str]:
    """The word error rate of each corpus and of all, with its 95 % interval by speaker."""
    evaluation = Evaluation()
    for item, errors in zip(items, counts, strict=True):
        evaluation.add(item.corpus, item.speaker, errors)
    parts = {**evaluation.corpora, "all": list(evaluation.speakers.values())}
    return {name: f"{pool(c).wer:.2%} ({format_interval(c)})" for name, c in parts.items()}


def halves_of(items: Iterable[Item]) -> npt.NDArray[np.bool_]:
    """Whether each utterance's speaker is in the first half, bool, (items,)."""
    keys = [(item.corpus, item.speaker) for item in items]
    first = set(sorted(set(keys))[0::2])
    return np.array([key in first for key in keys])


def _report(
    head: SearchTokens,
    counts: Mapping[Weights, Counts],
    items: Sequence[Item],
    on_line: Callable[[str], object],
) -> float:
    """Say what the weights are worth; return the cross-fitted error rate."""

    def choose(half: npt.NDArray[np.bool_]) -> Weights:
        best = find_lowest(counts, half)
        on_line(f"{head}: one half of the speakers chooses alpha {best[0]:g}, beta {best[1]:g}")
        return best

    found = cross_fit(items, choose, lambda weights, i: counts[weights][i])
    for corpus, rate in describe_errors(items, found).items():
        on_line(f"{head}: cross-fitted WER {rate} on {corpus}")
    best = find_lowest(counts, np.ones(len(items), np.bool_))
    on_line(f"{head}: to ship alpha {best[0]:g}, beta {best[1]:g}")
    return pool(found).wer


def _where(counts: Counts, chosen: npt.NDArray[np.bool_]) -> list[ErrorCounts]:
    return [counts[i] for i in np.flatnonzero(chosen)]


def fit_confidence(
    bundle: Bundle,
    lm: NgramModel,
    head: SearchTokens,
    settings: DecoderSettings,
    items: Sequence[Item],
) -> tuple[Confidence, ConfidenceFigures]:
    """Calibrate the confidences of one search; figures are held out."""
    plain = settings.model_copy(update={"confidence": Confidence()})
    decoder = make_beam_decoder(bundle, lm, head, plain)
    features, is_right, owners = [], [], []
    for i, item in enumerate(items):
        found, words = decoder.features(item.emissions[head])
        features.append(found)
        is_right += mark_right(item.reference, words)
        owners += [i] * len(words)
    x, y = np.concatenate(features), np.array(is_right)
    in_first = halves_of(items)[np.array(owners)]
    held_out = np.empty(len(y))
    for half in (in_first, ~in_first):
        intercept, weights = fit_logistic(x[half], y[half])
        held_out[~half] = _logistic(intercept + x[~half] @ weights)
    intercept, weights = fit_logistic(x, y)
    confidence = Confidence(
        intercept=round(intercept, 5), weights=tuple(round(w, 5) for w in weights.tolist())
    )
    plain_auc = rank_probability(x[:, WORD_FEATURES.index(LOWEST_PEAK)], y)
    return confidence, replace(measure_confidence(held_out, y), max_probability_auc=plain_auc)


def mark_right(reference: str, words: Sequence[str]) -> list[bool]:
    """Whether each recognised word is right, by the alignment that the error rate counts."""
    is_right = [False] * len(words)
    if words and reference:
        for chunk in jiwer.process_words(reference, " ".join(words)).alignments[0]:
            if chunk.type == "equal":
                for i in range(chunk.hyp_start_idx, chunk.hyp_end_idx):
                    is_right[i] = True
    return is_right


def fit_logistic(x: DoubleArray, y: npt.NDArray[np.bool_]) -> tuple[float, DoubleArray]:
    """Logistic regression with a small ridge on standardised features: intercept and weights.

    Args:
        x: features, float64, (n, feature).
        y: what is to be predicted, bool, (n,).
    """
    mean, spread = x.mean(axis=0), x.std(axis=0)
    spread[spread == 0] = 1.0
    z = np.column_stack([np.ones(len(x)), (x - mean) / spread])
    ridge = np.diag([0.0] + [_RIDGE] * x.shape[1])
    w = np.zeros(z.shape[1])
    for _ in range(_NEWTON_STEPS):
        p = _logistic(z @ w)
        gradient = z.T @ (y - p) - ridge @ w
        curvature = (z * (p * (1 - p))[:, None]).T @ z + ridge
        w += np.linalg.solve(curvature, gradient)
    weights = w[1:] / spread
    return float(w[0] - mean @ weights), weights


def measure_confidence(confidence: DoubleArray, y: npt.NDArray[np.bool_]) -> ConfidenceFigures:
    """Figures of confidences, float64, (n,), of words that are right or wrong, bool, (n,)."""
    p = np.clip(confidence, _LEAST, 1 - _LEAST)
    base = y.mean()
    entropy = -(base * np.log(base) + (1 - base) * np.log(1 - base))
    nce = 1 + np.where(y, np.log(p), np.log(1 - p)).mean() / entropy
    bins = np.array_split(np.argsort(confidence), 10)
    ece = sum(len(b) * abs(confidence[b].mean() - y[b].mean()) for b in bins if len(b)) / len(y)
    return ConfidenceFigures(float(nce), float(ece), rank_probability(confidence, y))


def rank_probability(confidence: DoubleArray, y: npt.NDArray[np.bool_]) -> float:
    """Probability that a right word has more confidence than a wrong one (AUC); ties count half."""
    _, inverse, n_equal = np.unique(confidence, return_inverse=True, return_counts=True)
    rank = (np.cumsum(n_equal) - (n_equal - 1) / 2)[inverse]
    n_right, n_wrong = int(y.sum()), int((~y).sum())
    return float((rank[y].sum() - n_right * (n_right + 1) / 2) / (n_right * n_wrong))


def draw_maps(maps: Mapping[SearchTokens, Mapping[Weights, float]], path: Path) -> None:
    """Draw the error rate by weights, one map for each search.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = _find_figure()(figsize=(6 * len(maps), 4.5), layout="constrained")
    for axes, (head, rates) in zip(
        figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True
    ):
        alphas, betas = (sorted({weights[i] for weights in rates}) for i in (0, 1))
        image = 100 * np.array([[rates[alpha, beta] for alpha in alphas] for beta in betas])
        axes.imshow(image, origin="lower", cmap="viridis_r", aspect="auto")
        for (row, column), rate in np.ndenumerate(image):
            axes.text(column, row, f"{rate:.1f}", ha="center", va="center", color="white")
        axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
        axes.set_yticks(range(len(betas)), [f"{beta:g}" for beta in betas])
        axes.set(xlabel="alpha", ylabel="beta", title=f"WER in %, {head}")
    figure.savefig(path, dpi=120)


def _find_figure() -> Any:  # noqa: ANN401  # matplotlib has no types
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  # wanted for plots only
    except ImportError as error:
        raise MissingExtraError(
            "a heat map needs matplotlib: pip install 'voxgate[benchmarks]'"
        ) from error
    return Figure


def _logistic(x: DoubleArray) -> DoubleArray:
    p: DoubleArray = 1 / (1 + np.exp(-x))
    return p
