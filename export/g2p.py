"""The letters-to-phones model as one small ONNX file that explains itself."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from service.errors import ExportError
from service.g2p import G2P_INPUTS, G2P_OUTPUT, Alphabets, Pronouncer
from training.g2p import LETTERS, G2pModel, load_g2p
from training.lexicon import PHONES

LARGEST_DIFFERENCE: Final = 1e-4
"""Largest difference of a log probability between torch and a float32 graph."""
LARGEST_INT8_DIFFERENCE: Final = 0.02
"""Largest mean difference of the probabilities between torch and a graph with int8 weights."""

_OPSET: Final = 17
_FEWEST_WEIGHTS: Final = 1024
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
    graph.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=graph.parent, prefix=".export-") as folder:
        written = Path(folder) / graph.name
        _write_graph(model, written)
        _check_graph(model, written, largest=LARGEST_DIFFERENCE)
        if int8:
            compress_weights(written)
            _check_graph(model, written, mean=LARGEST_INT8_DIFFERENCE)
        written.replace(graph)


def compress_weights(path: Path) -> None:
    """Keep each large weight as int8 and a scale a row; the graph multiplies them when it loads.

    Activations are not quantised: their scale would depend on the other words of a batch.
    """
    model = onnx.load(str(path))
    graph = model.graph
    for tensor in list(graph.initializer):
        weight = numpy_helper.to_array(tensor)
        if weight.dtype != np.float32 or weight.size < _FEWEST_WEIGHTS:
            continue
        scale = np.maximum(np.abs(weight).max(axis=-1, keepdims=True), 1e-12) / 127
        rounded = np.rint(weight / scale).astype(np.int8)
        names = [f"{tensor.name}_{part}" for part in ("int8", "scale", "float")]
        graph.initializer.remove(tensor)
        graph.initializer.append(numpy_helper.from_array(rounded, names[0]))
        graph.initializer.append(numpy_helper.from_array(scale, names[1]))
        cast = onnx.helper.make_node("Cast", names[:1], names[2:], to=onnx.TensorProto.FLOAT)
        multiply = onnx.helper.make_node("Mul", [names[2], names[1]], [tensor.name])
        graph.node.insert(0, multiply)
        graph.node.insert(0, cast)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _write_graph(model: G2pModel, path: Path) -> None:
    """Trace the model (the TorchScript path), batch and time free."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own age and of free batches
        torch.onnx.export(
            model,
            (torch.zeros(2, 5, dtype=torch.int64), torch.tensor([5, 3])),
            str(path),
            input_names=list(G2P_INPUTS),
            output_names=[G2P_OUTPUT],
            dynamic_axes={
                G2P_INPUTS[0]: {0: "batch", 1: "letter"},
                G2P_INPUTS[1]: {0: "batch"},
                G2P_OUTPUT: {0: "batch", 1: "frames"},
            },
            opset_version=_OPSET,
            dynamo=False,
        )
    graph = onnx.load(str(path))
    alphabets = Alphabets(letters=LETTERS, phones=PHONES, n_repeats=model.n_repeats)
    onnx.helper.set_model_props(graph, alphabets.to_metadata())
    onnx.checker.check_model(graph)
    onnx.save(graph, str(path))


def _check_graph(
    model: G2pModel, path: Path, *, largest: float = np.inf, mean: float = np.inf
) -> None:
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
    found = (float(np.max(differences)), float(np.max(shares)))
    if not (found[0] <= largest and found[1] <= mean):
        raise ExportError(
            f"the graph differs from the model: log_probs by up to {found[0]:.2g}, probabilities "
            f"by {found[1]:.2g} on average; nothing was written; report it with the checkpoint"
        )
