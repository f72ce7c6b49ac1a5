"""What the exports share: tracing a module, and a file that appears only when it was checked."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from service.errors import ExportError

_OPSET: Final = 17
_FEWEST_WEIGHTS: Final = 1024


class Difference(NamedTuple):
    """How far a graph is from its model; the exports say in what."""

    largest: float
    mean: float


def trace(
    module: nn.Module,
    example: tuple[Tensor, ...],
    path: Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    free: Mapping[str, Mapping[int, str]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a module as an ONNX graph (the TorchScript path; the other froze the time axis).

    Args:
        module: set to evaluate.
        example: inputs of any size.
        path: the file to write.
        inputs: their names.
        outputs: names of the outputs.
        free: for each name the axes whose size is free.
        metadata: kept in the file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own age and of free sizes
        torch.onnx.export(
            module.eval(),
            example,
            str(path),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: dict(axes) for name, axes in free.items()},
            opset_version=_OPSET,
            dynamo=False,
        )
    if metadata:
        graph = onnx.load(str(path))
        onnx.helper.set_model_props(graph, dict(metadata))
        onnx.save(graph, str(path))
    onnx.checker.check_model(str(path))


def write_checked(
    graph: Path,
    write: Callable[[Path], None],
    measure: Callable[[Path], Difference],
    *,
    largest: float,
    compress: Callable[[Path], None] | None,
    mean: float,
) -> None:
    """Write a graph that computes what the model computes, or nothing.

    Args:
        graph: the file; its folder is made.
        write: writes the float32 graph.
        measure: compares a graph with the model.
        largest: the largest difference of the float32 graph.
        compress: makes the graph smaller; None leaves it.
        mean: the largest mean difference of the smaller graph.

    Raises:
        ExportError: a difference is larger.
    """
    graph.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=graph.parent, prefix=".export-") as folder:
        written = Path(folder) / graph.name
        write(written)
        _refuse(measure(written), Difference(largest, np.inf))
        if compress is not None:
            compress(written)
            _refuse(measure(written), Difference(np.inf, mean))
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


def _refuse(found: Difference, allowed: Difference) -> None:
    if not (found.largest <= allowed.largest and found.mean <= allowed.mean):
        raise ExportError(
            f"the graph differs from the model by up to {found.largest:.2g} and by "
            f"{found.mean:.2g} on average, at most {min(allowed):.2g} is allowed; nothing was "
            "written: report it with the checkpoint"
        )
