"""Proof that a graph computes what the model computes, before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Final

import torch

from service.engine import OnnxEngine, OnnxStreamingEngine
from service.errors import ExportError
from training.model import AcousticModel, Chunking, output_lengths

LARGEST_DIFFERENCE: Final = 1e-4
"""Largest difference of a log probability between torch and a float32 graph."""
_BATCHES: Final = ((1, 1), (1, 7), (1, 100), (1, 1733), (3, 250), (8, 96))
"""(utterances, longest in feature frames) of the batches compared."""
_CHUNKINGS: Final = (Chunking(8, 8), Chunking(16, 8), Chunking(5, 3))


@dataclass(frozen=True)
class Parity:
    """How far a graph is from the model."""

    largest: float
    """Largest difference of a log probability."""
    mean: float
    """Mean difference of the probabilities."""


def check_parity(model: AcousticModel, graph: Path) -> Parity:
    """Compare a float32 graph with torch over lengths and batch sizes.

    Raises:
        ExportError: they differ by more than `LARGEST_DIFFERENCE`.
    """
    return _refuse_difference(measure_parity(model, graph))


def check_streaming_parity(model: AcousticModel, graph: Path) -> Parity:
    """Compare a float32 streaming graph with torch reading whole utterances window by window.

    Raises:
        ExportError: they differ by more than `LARGEST_DIFFERENCE`.
    """
    return _refuse_difference(measure_streaming_parity(model, graph))


def measure_parity(model: AcousticModel, graph: Path) -> Parity:
    """Differences of both heads between a graph and torch, over lengths and batch sizes."""
    engine = OnnxEngine(graph)
    differences = _Differences()
    for features, feature_lengths in _make_batches(len(model.feature_mean)):
        actual = torch.from_numpy(engine.log_probs(features.numpy(), feature_lengths.numpy()))
        differences.add(model, features, feature_lengths, None, actual)
    return differences.pool()


def measure_streaming_parity(model: AcousticModel, graph: Path) -> Parity:
    """Differences of both heads between stepping a streaming graph and torch, over chunkings."""
    engine = OnnxStreamingEngine(graph)
    differences = _Differences()
    for (features, feature_lengths), chunking in zip(
        _make_batches(len(model.feature_mean)), cycle(_CHUNKINGS), strict=False
    ):
        actual = _step_through(engine, model, features, feature_lengths, chunking)
        differences.add(model, features, feature_lengths, chunking, actual)
    return differences.pool()


def _refuse_difference(parity: Parity) -> Parity:
    if not parity.largest <= LARGEST_DIFFERENCE:
        raise ExportError(
            f"the exported graph differs from the model by {parity.largest:.2g} in log "
            f"probability, at most {LARGEST_DIFFERENCE:.0e} is allowed; nothing was written"
        )
    return parity


class _Differences:
    """Collects how far a graph is from the model."""

    def __init__(self) -> None:
        self._largest: list[torch.Tensor] = []
        self._means: list[torch.Tensor] = []

    def add(
        self,
        model: AcousticModel,
        features: torch.Tensor,
        feature_lengths: torch.Tensor,
        chunking: Chunking | None,
        actual_heads: torch.Tensor,
    ) -> None:
        """Compare both heads, log_probs (batch, frames, unit), on one batch."""
        with torch.no_grad():
            *expected_heads, lengths = model(features, feature_lengths, chunking)
        inside = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        sizes = [logits.shape[-1] for logits in expected_heads]
        for logits, actual in zip(expected_heads, actual_heads.split(sizes, -1), strict=True):
            expected = logits.log_softmax(-1)[inside]
            self._largest.append((actual[inside] - expected).abs().max())
            self._means.append((actual[inside].exp() - expected.exp()).abs().mean())

    def pool(self) -> Parity:
        """The largest and the mean over all batches."""
        return Parity(
            largest=float(torch.stack(self._largest).max()),  # not a number if any of them is not
            mean=float(torch.stack(self._means).mean()),
        )


def _step_through(
    engine: OnnxStreamingEngine,
    model: AcousticModel,
    features: torch.Tensor,
    feature_lengths: torch.Tensor,
    chunking: Chunking,
) -> torch.Tensor:
    """Feed a batch of streams window by window; log_probs of both heads, (batch, frames, unit)."""
    n_window = model.window_frames(chunking)
    n_step = chunking.n_chunk * model.convolutions.subsampling
    padded = torch.nn.functional.pad(features, (0, 0, 0, n_window)).numpy()
    state = engine.initial_state(len(features))
    chunks = []
    for first in range(0, features.shape[1], n_step):
        log_probs, _, state = engine.step(
            padded[:, first : first + n_window],
            (feature_lengths - first).clamp(1, n_window).numpy(),
            n_chunk_frames=chunking.n_chunk,
            state=state,
        )
        chunks.append(torch.from_numpy(log_probs[:, : chunking.n_chunk]))
    return torch.cat(chunks, 1)[:, : _longest(feature_lengths, model)]


def _longest(feature_lengths: torch.Tensor, model: AcousticModel) -> int:
    return int(output_lengths(feature_lengths, model.convolutions.subsampling).max())


def _make_batches(n_mels: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for n_utterances, longest in _BATCHES:
        features = torch.randn(n_utterances, longest, n_mels, generator=generator) * 4 - 8
        shortest = max(1, longest // 3)
        feature_lengths = torch.linspace(longest, shortest, n_utterances).long()
        assert int(output_lengths(feature_lengths, 4).min()) >= 1
        yield features, feature_lengths
