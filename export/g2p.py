"""The letters-to-phones model as one small ONNX file that explains itself."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch

from export.tracing import Difference, compress_weights, trace, write_checked
from service.g2p import G2P_INPUTS, G2P_OUTPUT, Alphabets, Pronouncer
from service.text import LETTERS
from training.g2p import G2pModel, load_g2p
from training.lexicon import PHONES

LARGEST_DIFFERENCE: Final = 1e-4
"""Largest difference of a log probability between torch and a float32 graph."""
LARGEST_INT8_DIFFERENCE: Final = 0.02
"""Largest mean difference of the probabilities between torch and a graph with int8 weights."""

_CHECKED_LENGTHS: Final = ((1,), (2, 1), (7, 3, 12), (30, 1, 8, 8, 5))


def export_g2p(checkpoint: Path, graph: Path, *, int8: bool = True) -> None:
    """Write the averaged weights of a checkpoint as a graph, or write nothing.

    Args:
        checkpoint: `best.pt` or `last.pt` of a run of `train_g2p`.
        graph: the ONNX file to write.
        int8: keep the weights in 8 bits, a quarter of the size; sums stay in float32.

    Raises:
        TrainingError: the checkpoint is missing, damaged or of another model.
        ExportError: the graph does not compute what the model computes.
    """
    model = load_g2p(checkpoint)
    write_checked(
        graph,
        partial(_write_graph, model),
        partial(_measure_graph, model),
        largest=LARGEST_DIFFERENCE,
        compress=compress_weights if int8 else None,
        mean=LARGEST_INT8_DIFFERENCE,
    )


def _write_graph(model: G2pModel, path: Path) -> None:
    """Trace the model, batch and time free."""
    alphabets = Alphabets(letters=LETTERS, phones=PHONES, n_repeats=model.n_repeats)
    trace(
        model,
        (torch.zeros(2, 5, dtype=torch.int64), torch.tensor([5, 3])),
        path,
        inputs=G2P_INPUTS,
        outputs=(G2P_OUTPUT,),
        free={
            G2P_INPUTS[0]: {0: "batch", 1: "letter"},
            G2P_INPUTS[1]: {0: "batch"},
            G2P_OUTPUT: {0: "batch", 1: "frames"},
        },
        metadata=alphabets.to_metadata(),
    )


def _measure_graph(model: G2pModel, path: Path) -> Difference:
    """Compare a graph with torch on random words, padded and not."""
    pronouncer = Pronouncer(path)
    generator = torch.Generator().manual_seed(0)
    differences, shares = [], []
    for lengths in map(torch.tensor, _CHECKED_LENGTHS):
        size = (len(lengths), int(lengths.max()))
        letters = torch.randint(len(LETTERS), size, generator=generator)
        with torch.inference_mode():
            expected = model(letters, lengths).numpy()
        actual = pronouncer.log_probs(letters.numpy(), lengths.numpy())
        for row, n_letters in enumerate(lengths.tolist()):
            n_frames = n_letters * model.n_repeats
            one, other = actual[row, :n_frames], expected[row, :n_frames]
            differences.append(np.abs(one - other).max())
            shares.append(np.abs(np.exp(one) - np.exp(other)).mean())
    return Difference(float(np.max(differences)), float(np.max(shares)))
