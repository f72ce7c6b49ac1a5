"""What textbooks say of recurrent networks, measured on real speech with small models.

python benchmarks/recurrent_claims.py TRAIN.jsonl --corpus an4 --output runs/claims [--claims …]

Every eighth speaker of the corpus is held out and all error rates are theirs. What is compared has
the same number of weights (the layers' width follows from it) and sees the same audio; only the
cell, the directions, the layers or the clipping differ. Runs that are done are not run again, so
the command may be interrupted. At the end it prints tables and draws `recurrent-claims.png`.

- `cells`: RNN, LSTM, GRU
- `directions`: forwards alone, both
- `depth`: 1, 2, 4, 8 layers, with and without skip connections
- `clipping`: gradients clipped or not, at a learning rate that is too high; how many runs end with
  more than 90 % of the characters wrong
- `reach`: how strongly the last output of a trained layer depends on what was k frames before
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from service.manifest import read_manifest
from training.checkpoint import load_checkpoint, load_model
from training.config import TrainingSettings
from training.model import AcousticModel, RecurrentLayer
from training.precision import processor_name
from training.train import train

CLAIMS: Final = ("cells", "directions", "depth", "clipping", "reach")
HELD_OUT_EVERY: Final = 8
N_PARAMETERS: Final = 800_000
FAILED_CER: Final = 0.9
REACH_FRAMES: Final = 100
NO_CLIPPING: Final = 1e9
TOO_HIGH_RATE: Final = 3e-2


@dataclass(frozen=True)
class Variant:
    """One model of a comparison."""

    claim: str
    name: str
    model: dict[str, Any]
    optimiser: dict[str, Any]

    @property
    def key(self) -> str:
        """Name of its folder."""
        return f"{self.claim}-{self.name}".replace(" ", "-").replace(",", "")


@dataclass(frozen=True)
class Plan:
    """What all runs share."""

    train: Path
    dev: Path
    output: Path
    n_passes: int

    def run(self, variant: Variant, seed: int) -> list[dict[str, Any]]:
        """Train a variant, or find what it did: the rows of its `dev.jsonl`."""
        directory = self.output / variant.key / f"seed-{seed}"
        settings = self._settings(variant, directory, seed)
        rows = read_rows(directory)
        if not rows or rows[-1]["epoch"] < settings.optimiser.n_epochs:
            if train(settings).epoch < settings.optimiser.n_epochs:
                raise SystemExit(f"{directory} was stopped; the same command goes on with it")
            rows = read_rows(directory)
        return rows

    def _settings(self, variant: Variant, directory: Path, seed: int) -> TrainingSettings:
        n_epochs = variant.optimiser.get("n_epochs", self.n_passes)
        optimiser = {
            "batch_s": 16.0,
            "learning_rate": 2e-3,
            "n_warmup_steps": 100,
            "average_decay": 0.99,
            "n_epochs": n_epochs,
        }
        return TrainingSettings.model_validate(
            {
                "data": {
                    "train": [self.train],
                    "dev": [self.dev],
                    "cache": self.output / "features",
                    "speeds": [1.0],
                    "n_jobs": 1,
                },
                "model": fit_width({"dropout": 0.1, "n_channels": 16, **variant.model}),
                "streaming": {"share": 0.0},
                "optimiser": {**optimiser, **variant.optimiser},
                "run": {
                    "directory": directory,
                    "seed": seed,
                    "n_threads": 1,
                    "precision": "float32",
                    "evaluate_every_epochs": max(1, n_epochs // 10),
                },
            }
        )


def main() -> None:
    """Train what is missing; print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--corpus", default="an4")
    parser.add_argument("--output", type=Path, default=Path("runs/claims"))
    parser.add_argument("--plot", type=Path, default=Path("docs/recurrent-claims.png"))
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=CLAIMS)
    parser.add_argument("--passes", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--clipping-seeds", type=int, default=5)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    train_manifest, dev_manifest = split_corpus(options.manifest, options.corpus, options.output)
    plan = Plan(train_manifest, dev_manifest, options.output, options.passes)
    print(f"{options.corpus}, {options.passes} passes, {processor_name()}\n")
    figure, axes = plt.subplots(1, len(options.claims), figsize=(5 * len(options.claims), 4))
    for claim, axis in zip(options.claims, np.atleast_1d(axes), strict=True):
        axis.set_title(claim)
        if claim == "reach":
            show_reach(plan, axis)
        elif claim == "clipping":
            show_clipping(plan, axis, n_seeds=options.clipping_seeds)
        else:
            show_errors(plan, make_variants(claim), axis, n_seeds=options.seeds)
    figure.tight_layout()
    figure.savefig(options.plot, dpi=80)


def make_variants(claim: str) -> list[Variant]:
    """What a claim compares."""
    if claim == "cells":
        models = {cell: {"cell": cell, "n_layers": 2} for cell in ("rnn", "lstm", "gru")}
    elif claim == "directions":
        models = {
            name: {"bidirectional": both, "n_layers": 2}
            for name, both in (("forwards", False), ("both", True))
        }
    else:
        models = {
            f"{n}, {'skips' if skip else 'plain'}": {"n_layers": n, "skip": skip}
            for skip in (True, False)
            for n in (1, 2, 4, 8)
        }
    return [Variant(claim, name, model, {}) for name, model in models.items()]


def show_errors(plan: Plan, variants: Sequence[Variant], axis: plt.Axes, *, n_seeds: int) -> None:
    """Character error rates at the end of equal budgets, and the curves to them."""
    print("| model | width | weights | CER by seed | mean |\n| --- | --- | --- | --- | --- |")
    for variant in variants:
        runs = [plan.run(variant, seed) for seed in range(1, n_seeds + 1)]
        rates = [rows[-1]["total"]["cer"] for rows in runs]
        shape = fit_width({"n_channels": 16, **variant.model})
        n_weights = count_weights(shape)
        print(
            f"| {variant.name} | {shape['hidden_size']} | {n_weights / 1e3:.0f} k | "
            f"{', '.join(f'{rate:.1%}' for rate in rates)} | {np.mean(rates):.1%} |",
            flush=True,
        )
        passes = [row["epoch"] for row in runs[0]]
        curve = np.mean([[row["total"]["cer"] for row in rows] for rows in runs], axis=0)
        axis.plot(passes, 100 * curve, label=variant.name)
    axis.set_xlabel("passes")
    axis.set_ylabel("character error rate, %")
    axis.legend()
    print()


def show_clipping(plan: Plan, axis: plt.Axes, *, n_seeds: int) -> None:
    """How many runs fail with and without clipping."""
    print("| cell | gradients | runs that failed | CER of the others |\n| --- | --- | --- | --- |")
    shares = {}
    for cell in ("rnn", "lstm"):
        for name, norm in (("clipped", 1.0), ("not clipped", NO_CLIPPING)):
            optimiser = {
                "learning_rate": TOO_HIGH_RATE,
                "clip_norm": norm,
                "n_epochs": max(1, plan.n_passes // 3),
                "n_warmup_steps": 0,
            }
            variant = Variant(
                "clipping", f"{cell} {name}", {"cell": cell, "n_layers": 2}, optimiser
            )
            rates = [plan.run(variant, seed)[-1]["total"]["cer"] for seed in range(1, n_seeds + 1)]
            learned = [rate for rate in rates if rate <= FAILED_CER]
            shares[f"{cell}\n{name}"] = 1 - len(learned) / len(rates)
            mean = f"{np.mean(learned):.1%}" if learned else "none"
            print(f"| {cell} | {name} | {len(rates) - len(learned)} of {len(rates)} | {mean} |")
    axis.bar(list(shares), [100 * share for share in shares.values()])
    axis.set_ylabel("runs that failed, %")
    print()


def show_reach(plan: Plan, axis: plt.Axes) -> None:
    """The gradient of the last output by the inputs before it."""
    print("| cell | weights | 1 frame | 10 | 30 | 60 | 99 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for cell in ("rnn", "lstm"):
        model = {"cell": cell, "bidirectional": False, "n_layers": 2}
        variant = Variant("reach", cell, model, {})
        plan.run(variant, 1)
        checkpoint = load_checkpoint(plan.output / variant.key / "seed-1" / "last.pt")
        trained = load_model(checkpoint)
        torch.manual_seed(0)
        untrained = AcousticModel(
            n_mels=len(trained.feature_mean),
            n_tokens=len(checkpoint.tokens),
            n_phones=len(checkpoint.phones),
            **checkpoint.settings["model"],
        )
        for name, network in (("at the start", untrained), ("trained", trained)):
            norms = measure_reach(network)
            shown = " | ".join(f"{norms[k] / norms[0]:.1e}" for k in (1, 10, 30, 60, 99))
            print(f"| {cell} | {name} | {shown} |")
            axis.semilogy(norms / norms[0], label=f"{cell}, {name}")
    axis.set_xlabel("frames of 40 ms before the output")
    axis.set_ylabel("gradient, relative to the last frame's")
    axis.legend()
    print()


def measure_reach(model: AcousticModel) -> npt.NDArray[np.float64]:
    """Norm of d(last output)/d(input k frames before) of the last layer, float64, (frames,)."""
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


def fit_width(model: dict[str, Any]) -> dict[str, Any]:
    """The model with the width that gives it `N_PARAMETERS` weights, as nearly as can be."""
    widths = range(8, 1024, 4)
    best = min(widths, key=lambda w: abs(count_weights({**model, "hidden_size": w}) - N_PARAMETERS))
    return {**model, "hidden_size": best}


def count_weights(model: dict[str, Any]) -> int:
    """Weights of an acoustic model, without building it twice as large in memory."""
    with torch.device("meta"):
        built = AcousticModel(n_mels=80, n_tokens=29, n_phones=40, **model)
    return sum(p.numel() for p in built.parameters())


def split_corpus(manifest: Path, corpus: str, output: Path) -> tuple[Path, Path]:
    """Write manifests of the corpus: all but every eighth speaker, and every eighth."""
    rows = [row for row in read_manifest(manifest) if row.corpus == corpus]
    if not rows:
        raise SystemExit(f"{manifest} has no utterances of the corpus {corpus!r}")
    speakers = sorted({row.speaker for row in rows})
    held_out = set(speakers[::HELD_OUT_EVERY])
    output.mkdir(parents=True, exist_ok=True)
    paths = output / "train.jsonl", output / "dev.jsonl"
    for path, is_dev in zip(paths, (False, True), strict=True):
        lines = [
            json.dumps(
                {
                    "audio_filepath": str(row.audio_path.resolve()),
                    "duration": row.duration_s,
                    "text": row.text,
                    "speaker": row.speaker,
                    "corpus": row.corpus,
                }
            )
            for row in rows
            if (row.speaker in held_out) == is_dev
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """The evaluations of a run."""
    path = directory / "dev.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
