"""What a training step costs when it is read window by window, against full context.

python benchmarks/training_step.py [RECIPE.toml]

Forward and backward of the acoustic model and both criteria on one random batch as large as the
recipe says, in the number type that is faster here. The modes take turns; printed are medians,
their ratios, and the average over the mix of the recipe.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Final

import torch

from service.text import CHARACTERS
from training.config import TrainingSettings, load_settings
from training.lexicon import PHONES
from training.loss import compute_losses
from training.model import AcousticModel, Chunking
from training.precision import choose_precision, device_name

_UTTERANCE_S: Final = 10.0
_N_LABELS: Final = 120
_FULL: Final = "full context"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    recipe = Path("training/recipes/en-small-streaming.toml")
    parser.add_argument("recipe", type=Path, nargs="?", default=recipe)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    settings = load_settings(arguments.recipe)
    step = Step(settings)
    dtype = choose_precision(lambda dtype: step(dtype, None), settings.run.precision)
    chunkings = [Chunking(*c) for c in settings.streaming.chunkings]
    modes = {_FULL: None, **{f"{c.n_chunk}+{c.n_right} frames": c for c in chunkings}}
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    for _ in range(arguments.rounds):
        for name, chunking in modes.items():
            began = time.perf_counter()
            step(dtype, chunking)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{device_name()}, {dtype}, {arguments.threads} thread(s)")
    for name, median in medians.items():
        print(f"{name:14} {median:.3f} s  {median / medians[_FULL]:.2f} times")
    share = settings.streaming.share
    streamed = statistics.mean(median for name, median in medians.items() if name != _FULL)
    mix = 1 - share + share * streamed / medians[_FULL]
    print(f"average over the mix: {mix:.2f} times")


class Step:
    """One training step without the optimiser, on a batch that stays."""

    def __init__(self, settings: TrainingSettings) -> None:
        n_utterances = max(1, round(settings.optimiser.batch_s / _UTTERANCE_S))
        n_frames = round(_UTTERANCE_S * 1000 / settings.features.hop_ms)
        self._model = AcousticModel(
            n_mels=settings.features.n_mels,
            n_tokens=len(CHARACTERS),
            n_phones=len(PHONES),
            **settings.model.model_dump(),
        )
        self._features = torch.randn(n_utterances, n_frames, settings.features.n_mels)
        self._lengths = torch.full((n_utterances,), n_frames)
        self._labels = torch.randint(1, len(CHARACTERS), (n_utterances, _N_LABELS))
        self._label_lengths = torch.full((n_utterances,), _N_LABELS)

    def __call__(self, dtype: torch.dtype, chunking: Chunking | None) -> None:
        """Forward and backward."""
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            tokens, phones, lengths = self._model(self._features, self._lengths, chunking)
        losses = compute_losses(
            tokens,
            phones,
            lengths,
            tokens=self._labels,
            token_lengths=self._label_lengths,
            phones=self._labels,
            phone_lengths=self._label_lengths,
        )
        losses.combine(0.5).backward()
        self._model.zero_grad()


if __name__ == "__main__":
    main()
