"""What a training step costs: read window by window, and with torch's kernels instead of ours.

python benchmarks/training_step.py [RECIPE.toml] [--utterance-s 5]

Forward and backward of the acoustic model and both criteria on one random batch as large as the
recipe says, in the number type that is faster here. The modes take turns; printed are medians,
their ratios, and the average over the mix of the recipe.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from unittest.mock import patch

import torch

from service.text import CHARACTERS
from training.config import TrainingSettings, load_settings
from training.crf import estimate_trigram
from training.lexicon import PHONES
from training.loss import compute_losses
from training.model import AcousticModel, Chunking
from training.precision import choose_precision, device_name

_LABELS_A_SECOND: Final = 12
_FULL: Final = "full context"
_TORCH: Final = "full context, torch's kernels"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    recipe = Path("training/recipes/en-small-deep.toml")
    parser.add_argument("recipe", type=Path, nargs="?", default=recipe)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--utterance-s", type=float, default=10.0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    settings = load_settings(arguments.recipe)
    step = Step(settings, utterance_s=arguments.utterance_s)
    dtype = choose_precision(lambda dtype: step(dtype, None), settings.run.precision)
    chunkings = [Chunking(*c) for c in settings.streaming.chunkings]
    modes = {_FULL: None, **{f"{c.n_chunk}+{c.n_right} frames": c for c in chunkings}}
    seconds: dict[str, list[float]] = {name: [] for name in (*modes, _TORCH)}
    for _ in range(arguments.rounds):
        for name, chunking in modes.items():
            began = time.perf_counter()
            step(dtype, chunking)
            seconds[name].append(time.perf_counter() - began)
        with torch_kernels():
            began = time.perf_counter()
            step(dtype, None)
            seconds[_TORCH].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{device_name()}, {dtype}, {arguments.threads} thread(s)")
    for name, median in medians.items():
        rate = step.audio_s / median
        print(f"{name:30} {median:.3f} s  {median / medians[_FULL]:.2f} times  {rate:.0f} x")
    share = settings.streaming.share
    streamed = statistics.mean(medians[name] for name, chunking in modes.items() if chunking)
    mix = 1 - share + share * streamed / medians[_FULL]
    print(f"average over the mix: {mix:.2f} times")


@contextmanager
def torch_kernels() -> Iterator[None]:
    """What a machine without a compiler does."""
    with (
        patch("training.lstm.load_kernel", return_value=None),
        patch("training.crf.load_kernel", return_value=None),
    ):
        yield


class Step:
    """One training step without the optimiser, on a batch that stays."""

    def __init__(self, settings: TrainingSettings, *, utterance_s: float) -> None:
        n_utterances = max(1, round(settings.optimiser.batch_s / utterance_s))
        n_frames = round(utterance_s * 1000 / settings.features.hop_ms)
        n_labels = round(utterance_s * _LABELS_A_SECOND)
        self.audio_s = n_utterances * utterance_s
        self._model = AcousticModel(
            n_mels=settings.features.n_mels,
            n_tokens=len(CHARACTERS),
            n_phones=len(PHONES),
            **settings.model.model_dump(),
        )
        self._features = torch.randn(n_utterances, n_frames, settings.features.n_mels)
        self._lengths = torch.full((n_utterances,), n_frames)
        self._labels = torch.randint(1, len(CHARACTERS), (n_utterances, n_labels))
        self._label_lengths = torch.full((n_utterances,), n_labels)
        is_crf = settings.optimiser.phone_criterion == "crf"
        said = self._labels.tolist()
        self._trigram = estimate_trigram(said, len(PHONES)) if is_crf else None

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
            trigram=self._trigram,
        )
        losses.combine(0.5).backward()
        self._model.zero_grad()


if __name__ == "__main__":
    main()
