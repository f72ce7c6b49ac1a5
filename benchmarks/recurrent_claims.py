"""What textbooks say of recurrent networks, measured on real speech with small models.

python benchmarks/recurrent_claims.py TRAIN.jsonl --corpus librispeech-train-clean-100 \
    --output runs/claims [--claims …]

The task is the classical one, which phone is said in each frame (Graves and Schmidhuber 2005), with
labels from pocketsphinx's forced alignment; unlike CTC it is learned from the first minutes on, so
that small budgets tell models apart. Every fourth speaker of the corpus is held out and all error
rates are theirs. What is compared has the same number of weights (the layers' width follows from
it) and sees the same audio; only the cell, the directions, the layers or the clipping differ. Runs
that are done are not run again, so the command may be interrupted. At the end it prints tables and
draws `recurrent-claims.png`.

- `cells`: RNN, LSTM, GRU, both directions
- `directions`: forwards alone, both, RNN and LSTM
- `depth`: 1, 2, 4, 8 layers, with and without skip connections
- `clipping`: gradients clipped or not, at learning rates that are too high; how many runs do no
  better at the end than the most frequent label in every frame
- `reach`: how strongly the last output of a layer depends on what was k frames before
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from forced_alignment import Phones, align_phones
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from service.audio import load_audio
from service.features import FeatureSettings, log_mel
from service.manifest import read_manifest
from training.lexicon import PHONES
from training.model import AcousticModel, Cell, RecurrentLayer
from training.precision import processor_name

CLAIMS: Final = ("cells", "directions", "depth", "clipping", "reach")
HELD_OUT_EVERY: Final = 4
N_PARAMETERS: Final = 400_000
N_CHANNELS: Final = 16
DROPOUT: Final = 0.1
SUBSAMPLING: Final = 4
BATCH: Final = 8
RATE: Final = 2e-3
CLIP_NORM: Final = 1.0
N_WARMUP_STEPS: Final = 50
SILENCE: Final = 0
"""Label of frames without a phone; the phones' are their places in `PHONES`."""
NO_LABEL: Final = -100
REACH_FRAMES: Final = 100
TOO_HIGH_RATES: Final = {"adamw": 0.3, "sgd": 10.0}
MOMENTUM: Final = 0.9
PLOTS_A_ROW: Final = 3

FloatArray = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Optimiser = Literal["adamw", "sgd"]

_FRAMES_PER_S: Final = 100


@dataclass(frozen=True)
class Variant:
    """One model and how it is trained."""

    cell: Cell = "lstm"
    n_layers: int = 2
    bidirectional: bool = True
    skip: bool = True
    optimiser: Optimiser = "adamw"
    rate: float = RATE
    clipped: bool = True

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join(
            (
                self.cell,
                str(self.n_layers),
                "both" if self.bidirectional else "ahead",
                "skip" if self.skip else "plain",
                self.optimiser,
                f"{self.rate:g}",
                "clipped" if self.clipped else "free",
            )
        )

    @cached_property
    def width(self) -> int:
        """Of a direction, with which the model has `N_PARAMETERS` weights, as nearly as can be."""

        def distance(width: int) -> int:
            with torch.device("meta"):
                return abs(count_weights(self._make(width)) - N_PARAMETERS)

        return min(range(8, 640, 4), key=distance)

    def build(self) -> AcousticModel:
        """The model, with weights drawn at random."""
        return self._make(self.width)

    def _make(self, width: int) -> AcousticModel:
        return AcousticModel(
            n_mels=FeatureSettings().n_mels,
            n_tokens=1,
            n_phones=len(PHONES),
            cell=self.cell,
            n_layers=self.n_layers,
            hidden_size=width,
            bidirectional=self.bidirectional,
            subsampling=SUBSAMPLING,
            n_channels=N_CHANNELS,
            dropout=DROPOUT,
            skip=self.skip,
        )


@dataclass(frozen=True)
class Speech:
    """Utterances with a label for each frame of the model's output."""

    features: Sequence[Tensor]
    """Log-mel, float32, (time, mel)."""
    labels: Sequence[Tensor]
    """int64, (frames,)."""

    @property
    def hours(self) -> float:
        """Of audio."""
        return sum(map(len, self.features)) / _FRAMES_PER_S / 3600

    def batch(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Features (batch, time, mel), their lengths, labels (batch, frames) with `NO_LABEL`."""
        features = [self.features[i] for i in chosen]
        labels = [self.labels[i] for i in chosen]
        lengths = torch.tensor([len(f) for f in features])
        return (
            pad_sequence(features, batch_first=True),
            lengths,
            pad_sequence(labels, batch_first=True, padding_value=NO_LABEL),
        )

    def batches(self, draw: np.random.Generator | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Utterances of like length together; drawn anew for each pass, where `draw` is given."""
        order = np.argsort([len(f) for f in self.features], kind="stable")
        groups = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
        if draw is not None:
            draw.shuffle(groups)
        yield from (self.batch(group.tolist()) for group in groups)


@dataclass(frozen=True)
class Plan:
    """What all runs share."""

    train: Speech
    held_out: Speech
    output: Path
    n_passes: int

    def errors(self, variant: Variant, seed: int, *, n_passes: int | None = None) -> list[float]:
        """Share of the held-out frames that are wrong after each pass; trains where need be."""
        n_passes = n_passes or self.n_passes
        directory = self.output / f"{variant.name}-{n_passes}-{seed}"
        path = directory / "errors.json"
        if not path.exists():
            start = time.monotonic()
            model, errors = self._train(variant, seed, n_passes)
            directory.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), directory / "model.pt")
            path.write_text(json.dumps(errors))
            tqdm.write(f"{directory.name}: {errors[-1]:.1%}, {time.monotonic() - start:.0f} s")
        loaded: list[float] = json.loads(path.read_text())
        return loaded

    def load(self, variant: Variant, seed: int) -> AcousticModel:
        """A model that `errors` trained."""
        model = variant.build()
        path = self.output / f"{variant.name}-{self.n_passes}-{seed}" / "model.pt"
        model.load_state_dict(torch.load(path, weights_only=True))
        return model

    def _train(
        self, variant: Variant, seed: int, n_passes: int
    ) -> tuple[AcousticModel, list[float]]:
        torch.manual_seed(seed)
        draw = np.random.default_rng(seed)
        model = variant.build()
        frames = torch.cat(list(self.train.features))
        model.feature_mean.copy_(frames.mean(0))
        model.feature_std.copy_(frames.std(0))
        optimiser = (
            torch.optim.AdamW(model.parameters(), lr=variant.rate)
            if variant.optimiser == "adamw"
            else torch.optim.SGD(model.parameters(), lr=variant.rate, momentum=MOMENTUM)
        )
        n_steps = n_passes * -(-len(self.train.features) // BATCH)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser,
            lambda step: (
                min(1.0, (step + 1) / N_WARMUP_STEPS) * (1 + np.cos(np.pi * step / n_steps)) / 2
            ),
        )
        errors = []
        for _ in range(n_passes):
            model.train()
            for batch in self.train.batches(draw):
                loss = nn.functional.cross_entropy(
                    _logits(model, batch), batch[2].flatten(), ignore_index=NO_LABEL
                )
                optimiser.zero_grad()
                loss.backward()
                if variant.clipped:
                    nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
                optimiser.step()
                schedule.step()
            errors.append(measure_error(model, self.held_out))
        return model, errors


def main() -> None:
    """Train what is missing; print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--corpus", default="librispeech-train-clean-100")
    parser.add_argument("--output", type=Path, default=Path("runs/claims"))
    parser.add_argument("--plot", type=Path, default=Path("docs/recurrent-claims.png"))
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=CLAIMS)
    parser.add_argument("--passes", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--clipping-seeds", type=int, default=5)
    parser.add_argument(
        "--rate-scale", type=float, default=1.0, help="times the rates of `clipping`"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, held_out = read_speech(options.manifest, options.corpus, options.output)
    plan = Plan(train, held_out, options.output, options.passes)
    print(
        f"{options.corpus}: {train.hours:.2f} hours in {options.passes} passes, "
        f"{held_out.hours:.2f} hours held out, {processor_name()}\n"
        f"the most frequent label in every frame: {guess_error(plan.held_out):.1%} wrong\n"
    )
    n_rows = -(-len(options.claims) // PLOTS_A_ROW)
    figure = plt.figure(figsize=(5 * PLOTS_A_ROW, 4 * n_rows))
    for i, claim in enumerate(options.claims, 1):
        axis = figure.add_subplot(n_rows, PLOTS_A_ROW, i, title=claim)
        if claim == "reach":
            show_reach(plan, axis)
        elif claim == "clipping":
            show_clipping(plan, axis, n_seeds=options.clipping_seeds, rate_scale=options.rate_scale)
        else:
            show_errors(plan, make_variants(claim), axis, n_seeds=options.seeds)
    figure.tight_layout()
    figure.savefig(options.plot, dpi=80)


def make_variants(claim: str) -> dict[str, Variant]:
    """What a claim compares, by the name it is shown under."""
    cells: tuple[Cell, ...] = ("rnn", "lstm", "gru")
    if claim == "cells":
        return {cell: Variant(cell) for cell in cells}
    if claim == "directions":
        return {
            f"{cell}, {'both' if both else 'forwards'}": Variant(cell, bidirectional=both)
            for cell in cells[:2]
            for both in (False, True)
        }
    return {
        f"{n}, {'skips' if skip else 'plain'}": Variant(n_layers=n, skip=skip)
        for skip in (True, False)
        for n in (1, 2, 4, 8)
    }


def show_errors(plan: Plan, variants: dict[str, Variant], axis: plt.Axes, *, n_seeds: int) -> None:
    """Frame error rates at the end of equal budgets, and the curves to them."""
    print("| model | width | weights | frames wrong, by seed | mean |")
    print("| --- | --- | --- | --- | --- |")
    for name, variant in variants.items():
        curves = [plan.errors(variant, seed) for seed in range(1, n_seeds + 1)]
        rates = [curve[-1] for curve in curves]
        print(
            f"| {name} | {variant.width} | {count_weights(variant.build()) / 1e3:.0f} k | "
            f"{', '.join(f'{rate:.1%}' for rate in rates)} | {np.mean(rates):.1%} |",
            flush=True,
        )
        mean = 100 * np.mean(curves, axis=0)
        axis.plot(range(1, len(mean) + 1), mean, label=name)
    axis.set_xlabel("passes")
    axis.set_ylabel("frames wrong, %")
    axis.legend()
    print()


def show_clipping(plan: Plan, axis: plt.Axes, *, n_seeds: int, rate_scale: float) -> None:
    """How many runs fail with and without clipping."""
    print("| cell | optimiser | gradients | runs that failed | frames wrong in the others |")
    print("| --- | --- | --- | --- | --- |")
    shares = {}
    cells: tuple[Cell, ...] = ("rnn", "lstm")
    optimisers: tuple[Optimiser, ...] = ("sgd", "adamw")
    failure = guess_error(plan.held_out)
    for cell in cells:
        for optimiser in optimisers:
            for clipped in (True, False):
                rate = rate_scale * TOO_HIGH_RATES[optimiser]
                variant = Variant(cell, optimiser=optimiser, rate=rate, clipped=clipped)
                rates = [
                    plan.errors(variant, seed, n_passes=1)[-1] for seed in range(1, n_seeds + 1)
                ]
                learned = [rate for rate in rates if rate < failure]
                word = "clipped" if clipped else "not clipped"
                shares[f"{cell}\n{optimiser}\n{word}"] = 1 - len(learned) / len(rates)
                mean = f"{np.mean(learned):.1%}" if learned else "none"
                print(
                    f"| {cell} | {optimiser}, {variant.rate:g} | {word} | "
                    f"{len(rates) - len(learned)} of {len(rates)} | {mean} |",
                    flush=True,
                )
    axis.bar(list(shares), [100 * share for share in shares.values()])
    axis.tick_params("x", labelsize=6)
    axis.set_ylabel("runs that failed, %")
    print()


def show_reach(plan: Plan, axis: plt.Axes) -> None:
    """The gradient of the last output by the inputs before it."""
    print("| cell | weights | 1 frame | 10 | 30 | 60 | 99 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    cells: tuple[Cell, ...] = ("rnn", "lstm")
    for cell in cells:
        variant = Variant(cell, bidirectional=False)
        plan.errors(variant, 1)
        torch.manual_seed(0)
        for name, network in (
            ("at the start", variant.build()),
            ("trained", plan.load(variant, 1)),
        ):
            norms = measure_reach(network)
            shown = " | ".join(f"{norms[k] / norms[0]:.1e}" for k in (1, 10, 30, 60, 99))
            print(f"| {cell} | {name} | {shown} |")
            axis.semilogy(norms / norms[0], label=f"{cell}, {name}")
    axis.set_xlabel(f"frames of {10 * SUBSAMPLING} ms before the output")
    axis.set_ylabel("gradient, relative to the last frame's")
    axis.legend()
    print()


def measure_reach(model: AcousticModel) -> npt.NDArray[np.float64]:
    """Norm of d(last output)/d(input k frames before) of the last layer, (frames,)."""
    layer = model.layers[-1]
    assert isinstance(layer, RecurrentLayer)
    draw = torch.Generator().manual_seed(0)
    width = layer.norm.normalized_shape[0]
    x = torch.randn(16, REACH_FRAMES, width, generator=draw).requires_grad_()
    outputs: Tensor = layer.ahead(layer.norm(x))[0][:, -1]
    directions = torch.randn(outputs.shape, generator=draw)
    (gradient,) = torch.autograd.grad((outputs * directions).sum(), x)
    norms = gradient.norm(dim=-1).mean(0).flip(0)  # the last frame first
    return np.asarray(norms, np.float64)


def measure_error(model: AcousticModel, speech: Speech) -> float:
    """Share of the frames whose label is not the model's first choice."""
    model.eval()
    n_wrong = n_frames = 0
    with torch.inference_mode():
        for batch in speech.batches(None):
            labels = batch[2].flatten()
            known = labels != NO_LABEL
            n_wrong += int((_logits(model, batch).argmax(-1)[known] != labels[known]).sum())
            n_frames += int(known.sum())
    return n_wrong / n_frames


def guess_error(speech: Speech) -> float:
    """The same of the most frequent label in every frame."""
    counts = torch.cat(list(speech.labels)).bincount()
    return 1 - int(counts.max()) / int(counts.sum())


def count_weights(model: nn.Module) -> int:
    """How many numbers a model learns."""
    return sum(p.numel() for p in model.parameters())


def read_speech(manifest: Path, corpus: str, output: Path) -> tuple[Speech, Speech]:
    """The corpus with its labels: all but every fourth speaker, and every fourth."""
    rows = [row for row in read_manifest(manifest) if row.corpus == corpus]
    if not rows:
        raise SystemExit(f"{manifest} has no utterances of the corpus {corpus!r}")
    held_out = set(sorted({row.speaker for row in rows})[::HELD_OUT_EVERY])
    path = output / f"{corpus}.phones.json"
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor() as processes:
            aligned = list(tqdm(processes.map(align_phones, rows), "aligning", len(rows)))
        path.write_text(json.dumps(aligned))
    parts: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])
    settings = FeatureSettings()
    for row, phones in zip(rows, json.loads(path.read_text()), strict=True):
        if phones:
            waveform = load_audio(row.audio_path, target_rate=settings.sample_rate)
            features = torch.from_numpy(log_mel(waveform, settings))
            labels = label_frames(phones, -(-len(features) // SUBSAMPLING))
            parts[row.speaker in held_out].append((features, torch.from_numpy(labels)))
    train, dev = (Speech(*map(list, zip(*part, strict=True))) for part in parts)
    return train, dev


def label_frames(phones: Phones, n_frames: int) -> Labels:
    """The label at the middle of each output frame, int64, (frames,)."""
    labels = np.full(n_frames * SUBSAMPLING, SILENCE)
    for name, start, duration in phones:
        if name in PHONES:
            labels[start : start + duration] = PHONES.index(name)
    return labels[SUBSAMPLING // 2 :: SUBSAMPLING].astype(np.int64)


def _logits(model: AcousticModel, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Of the phones, (batch · frames, phone)."""
    features, lengths, labels = batch
    logits: Tensor = model(features, lengths)[1]
    return logits[:, : labels.shape[1]].flatten(0, 1)


if __name__ == "__main__":
    main()
