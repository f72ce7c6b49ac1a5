"""The acoustic model as an ONNX graph, and as an int8 one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from export.tracing import trace
from service.engine import (
    INPUTS,
    OUTPUTS,
    SPELL,
    STATES,
    STREAMING_INPUTS,
    STREAMING_OUTPUTS,
)
from training.model import AcousticModel, Chunking, StreamState

_EXAMPLE_FRAMES: Final = 200
_EXAMPLE_CHUNK: Final = 5
_EXAMPLE_RIGHT: Final = 3


class ServedModel(nn.Module):
    """What is exported: both heads as log probabilities."""

    def __init__(self, model: AcousticModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features to log_probs of both heads and their lengths; see `AcousticModel`."""
        token_logits, phone_logits, lengths = self.model(features, feature_lengths)
        return token_logits.log_softmax(-1), phone_logits.log_softmax(-1), lengths


class StreamedModel(nn.Module):
    """What is exported for streams: one window, and the states before and after it."""

    def __init__(self, model: AcousticModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, features: Tensor, feature_lengths: Tensor, n_chunk: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        """A window to log_probs of both heads, lengths and states; see `forward_window`."""
        missing = self.model.initial_state(len(features))[len(states) :]
        token_logits, phone_logits, lengths, after = self.model.forward_window(
            features, feature_lengths, n_chunk, StreamState(*states, *missing)
        )
        heads = token_logits.log_softmax(-1), phone_logits.log_softmax(-1)
        return *heads, lengths, *after[: len(states)]


def export_graph(model: AcousticModel, path: Path) -> None:
    """Write the float32 graph of the full-context model, batch and time free."""
    features = torch.zeros(2, _EXAMPLE_FRAMES, len(model.feature_mean))
    feature_lengths = torch.tensor([_EXAMPLE_FRAMES, _EXAMPLE_FRAMES // 2])
    _export(ServedModel(model), (features, feature_lengths), path, inputs=INPUTS, outputs=OUTPUTS)


def export_streaming_graph(model: AcousticModel, path: Path) -> None:
    """Write the float32 graph of one window; batch, time and the chunk's length are free."""
    n_chunk = torch.tensor(_EXAMPLE_CHUNK)
    n_frames = model.window_frames(Chunking(_EXAMPLE_CHUNK, _EXAMPLE_RIGHT))
    n_missing = 0 if model.spelling is not None else 1
    features = torch.zeros(2, n_frames, len(model.feature_mean))
    feature_lengths = torch.tensor([n_frames, n_frames // 2])
    _export(
        StreamedModel(model),
        (features, feature_lengths, n_chunk, *model.initial_state(2)[: len(STATES) - n_missing]),
        path,
        inputs=STREAMING_INPUTS[: len(STREAMING_INPUTS) - n_missing],
        outputs=STREAMING_OUTPUTS[: len(STREAMING_OUTPUTS) - n_missing],
    )


def _export(
    module: nn.Module,
    example: tuple[Tensor, ...],
    path: Path,
    *,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
) -> None:
    """Trace and write a graph."""
    free = {name: {0: "batch"} for name in (*inputs, *outputs) if name != "n_chunk_frames"}
    free["features"][1] = "time"
    for name in OUTPUTS[:2]:
        free[name][1] = "frames"
    trace(module, example, path, inputs=inputs, outputs=outputs, free=free)


def quantise_graph(source: Path, target: Path) -> None:
    """Quantise the matrix products to int8, activations scaled as they come.

    Weights keep 7 bits: processors without VNNI add pairs of products in 16 bits, which 8-bit
    weights would overflow.
    """
    graph = onnx.load(str(source))
    _separate_weights(graph)  # the quantiser leaves out the second user of a weight
    logging.disable(logging.WARNING)  # it recommends steps that bring nothing here
    try:
        quantize_dynamic(
            graph,
            str(target),
            op_types_to_quantize=["LSTM", "MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
    finally:
        logging.disable(logging.NOTSET)
    quantised = onnx.load(str(target))
    _share_weights(quantised)
    onnx.save(quantised, str(target))


def make_spelling_optional(path: Path) -> None:
    """Put all that the tokens alone need behind a condition, the graph's new input `SPELL`.

    Where it is false, the tokens' log_probs are one NaN a token and the state of the spelling
    layers stays as it is.
    """
    model = onnx.load(str(path))
    graph = model.graph
    spelt = [o for o in graph.output if o.name in (OUTPUTS[0], f"next_{STATES[3]}")]
    heard = {o.name for o in graph.output} - {o.name for o in spelt}
    shared = []
    for node in reversed(graph.node):  # they are sorted: users come behind
        if heard.intersection(node.output):
            heard.update(node.input)
            shared.append(node)
    own = [node for node in graph.node if not heard.intersection(node.output)]
    n_tokens = spelt[0].type.tensor_type.shape.dim[2].dim_value
    unknown = onnx.helper.make_tensor(
        "unknown", onnx.TensorProto.FLOAT, [1, 1, n_tokens], [float("nan")] * n_tokens
    )
    skipped = [onnx.helper.make_node("Constant", [], [spelt[0].name], value=unknown)]
    skipped += [onnx.helper.make_node("Identity", [STATES[3]], [o.name]) for o in spelt[1:]]
    branches = {}
    for name, nodes in (("then_branch", own), ("else_branch", skipped)):
        unshaped = [
            onnx.helper.make_tensor_value_info(o.name, onnx.TensorProto.FLOAT, None) for o in spelt
        ]
        branches[name] = onnx.helper.make_graph(nodes, name, [], unshaped)
    condition = onnx.helper.make_node("If", [SPELL], [o.name for o in spelt], **branches)
    del graph.node[:]
    graph.node.extend([*reversed(shared), condition])
    graph.input.append(onnx.helper.make_tensor_value_info(SPELL, onnx.TensorProto.BOOL, []))
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _separate_weights(graph: onnx.ModelProto) -> None:
    """Replace the Identity operators by which the exporter shares weights by copies of them."""
    weights = {tensor.name: tensor for tensor in graph.graph.initializer}
    nodes = list(graph.graph.node)
    del graph.graph.node[:]
    for node in nodes:
        if node.op_type == "Identity" and node.input[0] in weights:
            copy = graph.graph.initializer.add()
            copy.CopyFrom(weights[node.input[0]])
            copy.name = node.output[0]
        else:
            graph.graph.node.append(node)


def _share_weights(graph: onnx.ModelProto) -> None:
    """Keep one of several equal weights."""
    first: dict[bytes, str] = {}
    kept, renamed = [], {}
    for tensor in graph.graph.initializer:
        unnamed = onnx.TensorProto()
        unnamed.CopyFrom(tensor)
        unnamed.name = ""
        name = first.setdefault(unnamed.SerializeToString(), tensor.name)
        renamed[tensor.name] = name
        if name == tensor.name:
            kept.append(tensor)
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
    for node in graph.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
