"""The understanding model as one small ONNX file that explains itself."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
import torch

from export.g2p import compress_weights
from service.errors import ExportError
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

_OPSET: Final = 17
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
    graph.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=graph.parent, prefix=".export-") as folder:
        written = Path(folder) / graph.name
        _write_graph(model, written)
        _check_graph(model, written, largest=LARGEST_DIFFERENCE)
        if int8:
            compress_weights(written)
            _check_graph(model, written, mean=LARGEST_INT8_DIFFERENCE)
        written.replace(graph)


def _write_graph(model: UnderstandingModel, path: Path) -> None:
    """Trace the model (the TorchScript path); batch, words and characters are free."""
    lengths = torch.tensor([5, 3])
    words, characters = _draw_inputs(model, lengths, torch.Generator().manual_seed(0))
    axes = {0: "batch", 1: "word", 2: "character"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own age and of free batches
        torch.onnx.export(
            model,
            (words, characters, lengths),
            str(path),
            input_names=list(UNDERSTANDING_INPUTS),
            output_names=list(UNDERSTANDING_OUTPUTS),
            dynamic_axes={
                UNDERSTANDING_INPUTS[0]: {0: axes[0], 1: axes[1]},
                UNDERSTANDING_INPUTS[1]: axes,
                UNDERSTANDING_INPUTS[2]: {0: axes[0]},
                UNDERSTANDING_OUTPUTS[0]: {0: axes[0], 1: axes[1]},
                UNDERSTANDING_OUTPUTS[1]: {0: axes[0]},
            },
            opset_version=_OPSET,
            dynamo=False,
        )
    graph = onnx.load(str(path))
    onnx.helper.set_model_props(graph, to_metadata(model.vocabulary, model.crf.costs()))
    onnx.checker.check_model(graph)
    onnx.save(graph, str(path))


def _check_graph(
    model: UnderstandingModel, path: Path, *, largest: float = np.inf, mean: float = np.inf
) -> None:
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
    found = (max(differences), max(shares))
    if not (found[0] <= largest and found[1] <= mean):
        raise ExportError(
            f"the graph differs from the model: scores by up to {found[0]:.2g}, probabilities by "
            f"{found[1]:.2g} on average; nothing was written; report it with the checkpoint"
        )


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
