"""How busy the input pipeline keeps training: real batches against random tensors.

python benchmarks/training_speed.py RECIPE.toml [section.key=value ...]

The same steps, twice in turn: once as training makes them (features loaded ahead by the loader's
process, augmented, padded), once on random features of the same shapes that are in memory and are
not augmented. Printed are seconds of audio a second of both, and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from training.config import load_settings
from training.data import Batch, load_batches
from training.distributed import World
from training.precision import device_name
from training.train import TrainingRun


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*arguments.overrides, f'run.directory="{folder}"']
        settings = load_settings(arguments.recipe, overrides)
        if settings.run.n_threads:
            torch.set_num_threads(settings.run.n_threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        run = TrainingRun(settings, World(rank=0, size=1, device=device))
        measure(run, n_steps=arguments.steps, n_rounds=arguments.rounds)


def measure(run: TrainingRun, *, n_steps: int, n_rounds: int) -> None:
    """Print the rates of both kinds of input."""
    stream = run.open_stream(first_batch=0)
    random = [
        replace(batch, features=torch.randn_like(batch.features))
        for batch in islice(stream, n_steps)
    ]
    audio_s = sum(float(batch.feature_lengths.sum()) for batch in random) * run.frame_s
    augment = run.augment
    time_steps(run, random[:2])  # the first steps set things up
    rates: dict[str, list[float]] = {"real": [], "random": []}
    for _ in tqdm(range(n_rounds), "rounds"):
        run.augment = lambda batch: batch.features  # type: ignore[assignment]  # as it is
        rates["random"].append(audio_s / time_steps(run, random))
        run.augment = augment
        with load_batches(stream) as batches:
            first = next(batches)  # training starts its loader once, not every few steps
            time_steps(run, [first])
            seconds = time_steps(run, islice(batches, n_steps - 1))
        heard_s = audio_s - float(first.feature_lengths.sum()) * run.frame_s
        rates["real"].append(heard_s / seconds)
    real, made_up = (statistics.median(rates[kind]) for kind in ("real", "random"))
    print(f"{device_name()}, {torch.get_num_threads()} thread(s), {run.dtype}")
    print(
        f"real batches {real:.0f}, random tensors {made_up:.0f} s of audio/s: {real / made_up:.1%}"
    )


def time_steps(run: TrainingRun, batches: Iterable[Batch]) -> float:
    """Seconds of optimiser steps on some batches."""
    start = time.perf_counter()
    for batch in batches:
        run.step(batch, n_batches=1_000_000)
    if run.world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
