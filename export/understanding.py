"""The understanding model as one small ONNX file that explains itself."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from export.tracing import Difference, compress_weights, trace, write_checked
from service.understanding import (
    N_SPECIAL_CHARACTERS,
    UNDERSTANDING_INPUTS,
    UNDERSTANDING_OUTPUTS,
    Understander,
    to_metadata,
)
from training.understanding import UnderstandingModel, load_understanding

LARGEST_DIFFERENCE: Final = 1e-4
"""Largest difference of a score or log probability between torch and a float32 graph."""
LARGEST_INT8_DIFFERENCE: Final = 0.02
"""Largest mean difference of the probabilities between torch and a graph with int8 weights."""

_CHECKED_LENGTHS: Final = ((1,), (2, 1), (7, 3, 12), (30, 1, 8, 8, 5))
_CHECKED_CHARACTERS: Final = 9


def export_understanding(checkpoint: Path, graph: Path, *, int8: bool = True) -> None:
    """Write the averaged weights of a checkpoint as a graph, or write nothing.

    Args:
        checkpoint: `best.pt` or `last.pt` of a run of `train_understanding` or `fit`.
        graph: the ONNX file to write.
        int8: keep the weights in 8 bits, a quarter of the size; sums stay in float32.

    Raises:
        TrainingError: the checkpoint is missing, damaged or of another model.
        ExportError: the graph does not compute what the model computes.
    """
    model = load_understanding(checkpoint)
    write_checked(
        graph,
        partial(_write_graph, model),
        partial(_measure_graph, model),
        largest=LARGEST_DIFFERENCE,
        compress=compress_weights if int8 else None,
        mean=LARGEST_INT8_DIFFERENCE,
    )


def _write_graph(model: UnderstandingModel, path: Path) -> None:
    """Trace the model; batch, words and characters are free."""
    lengths = torch.tensor([5, 3])
    words, characters = _draw_inputs(model, lengths, torch.Generator().manual_seed(0))
    axes = {0: "batch", 1: "word", 2: "character"}
    trace(
        model,
        (words, characters, lengths),
        path,
        inputs=UNDERSTANDING_INPUTS,
        outputs=UNDERSTANDING_OUTPUTS,
        free={
            UNDERSTANDING_INPUTS[0]: {0: axes[0], 1: axes[1]},
            UNDERSTANDING_INPUTS[1]: axes,
            UNDERSTANDING_INPUTS[2]: {0: axes[0]},
            UNDERSTANDING_OUTPUTS[0]: {0: axes[0], 1: axes[1]},
            UNDERSTANDING_OUTPUTS[1]: {0: axes[0]},
        },
        metadata=to_metadata(model.vocabulary, model.crf.costs()),
    )


def _measure_graph(model: UnderstandingModel, path: Path) -> Difference:
    """Compare a graph with torch on random utterances, padded and not."""
    understander = Understander(path)
    generator = torch.Generator().manual_seed(0)
    differences, shares = [], []
    for lengths in map(torch.tensor, _CHECKED_LENGTHS):
        words, characters = _draw_inputs(model, lengths, generator)
        with torch.inference_mode():
            expected = [output.numpy() for output in model(words, characters, lengths)]
        actual = understander.scores(words.numpy(), characters.numpy(), lengths.numpy())
        inside = np.arange(words.shape[1]) < lengths.numpy()[:, np.newaxis]
        for one, other in ((actual[0][inside], expected[0][inside]), (actual[1], expected[1])):
            differences.append(float(np.abs(one - other).max()))
            shares.append(float(np.abs(_softmax(one) - _softmax(other)).mean()))
    return Difference(max(differences), max(shares))


def _draw_inputs(
    model: UnderstandingModel, lengths: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random words, (batch, word), and characters, (batch, word, character), of random length."""
    size = (len(lengths), int(lengths.max()))
    n_characters = len(model.vocabulary.characters) + N_SPECIAL_CHARACTERS
    words = torch.randint(len(model.vocabulary.words) + 1, size, generator=generator)
    shape = (*size, _CHECKED_CHARACTERS)
    characters = torch.randint(1, n_characters, shape, generator=generator)
    ends = torch.randint(1, _CHECKED_CHARACTERS + 1, (*size, 1), generator=generator)
    return words, characters.masked_fill(torch.arange(_CHECKED_CHARACTERS) >= ends, 0)


def _softmax(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(shares / shares.sum(-1, keepdims=True), np.float32)
