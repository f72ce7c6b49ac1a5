"""Proof that a graph computes what the model computes, before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnxruntime
import torch

from export.graph import ServedModel
from service.engine import INPUTS, OUTPUTS
from service.errors import ExportError
from training.model import AcousticModel, output_lengths

LARGEST_DIFFERENCE: Final = 1e-4
"""Largest difference of a log probability between torch and a float32 graph."""
_BATCHES: Final = ((1, 1), (1, 7), (1, 100), (1, 1733), (3, 250), (8, 96))
"""(utterances, longest in feature frames) of the batches compared."""


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
    parity = measure_parity(model, graph)
    if not parity.largest <= LARGEST_DIFFERENCE:
        raise ExportError(
            f"the exported graph differs from the model by {parity.largest:.2g} in log "
            f"probability, at most {LARGEST_DIFFERENCE:.0e} is allowed; nothing was written"
        )
    return parity


def measure_parity(model: AcousticModel, graph: Path) -> Parity:
    """Differences of both heads between a graph and torch, over lengths and batch sizes."""
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    served = ServedModel(model).eval()
    largest, differences = [], []
    for features, feature_lengths in _make_batches(len(model.feature_mean)):
        with torch.no_grad():
            *expected_heads, lengths = served(features, feature_lengths)
        inputs = dict(zip(INPUTS, (features.numpy(), feature_lengths.numpy()), strict=True))
        actual_heads = map(torch.from_numpy, session.run(list(OUTPUTS[:2]), inputs))
        inside = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        for expected, actual in zip(expected_heads, actual_heads, strict=True):
            largest.append((actual - expected)[inside].abs().max())
            differences.append((actual.exp() - expected.exp())[inside].abs().mean())
    return Parity(
        largest=float(torch.stack(largest).max()),  # not a number if any of them is not
        mean=float(torch.stack(differences).mean()),
    )


def _make_batches(n_mels: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for n_utterances, longest in _BATCHES:
        features = torch.randn(n_utterances, longest, n_mels, generator=generator) * 4 - 8
        shortest = max(1, longest // 3)
        feature_lengths = torch.linspace(longest, shortest, n_utterances).long()
        assert int(output_lengths(feature_lengths, 4).min()) >= 1
        yield features, feature_lengths
