"""The rescoring language model as one ONNX file that explains itself: one step over trie nodes.

What the first layer makes of a piece is worked out beforehand, a row a piece, so that a step
multiplies only states. With int8 weights those products are in 8 bits as well: every node has its
own scale, so that the other nodes of a run change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from export.tracing import Difference, trace, write_checked
from service.rescorer import BOUNDARY_ID, RESCORER_INPUTS, RESCORER_OUTPUT, Pieces, Rescorer
from training.model import Cell
from training.rnn_lm import LanguageModel, load_language_model

LARGEST_DIFFERENCE: Final = 1e-3
"""Largest difference of a sentence's log probability between torch and a float32 graph."""
LARGEST_INT8_DIFFERENCE: Final = 0.1
"""Largest mean difference of a piece's log probability between torch and an int8 graph."""

_N_CHECKED: Final = 24
_CHECKED_TOKENS: Final = 20
_Array = npt.NDArray[Any]


class RecurrentStep(nn.Module):
    """One step of a layer: the inputs' share of the gates and the states give new states."""

    def __init__(self, layer: nn.RNNBase, *, cell: Cell) -> None:
        super().__init__()
        self.cell = cell
        self.inputs = _make_linear(layer, "ih")
        self.recurrent = _make_linear(layer, "hh")

    @property
    def state_names(self) -> tuple[str, ...]:
        """What a node remembers of this layer; the output comes first."""
        return ("hidden", "cell") if self.cell == "lstm" else ("hidden",)

    def forward(self, gates: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Step.

        Args:
            gates: what the inputs add to each gate, float32, (node, gate * unit).
            states: of each node's parent, float32, (node, unit) each.

        Returns:
            The new states, the output first.
        """
        recurrent = self.recurrent(states[0])  # (node, gate * unit)
        if self.cell == "rnn":
            return ((gates + recurrent).tanh(),)
        if self.cell == "gru":
            (r, z, n), (rh, zh, nh) = gates.chunk(3, -1), recurrent.chunk(3, -1)
            update = (z + zh).sigmoid()
            new = (n + (r + rh).sigmoid() * nh).tanh()
            return (new + update * (states[0] - new),)
        i, f, g, o = (gates + recurrent).chunk(4, -1)
        kept = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * kept.tanh(), kept


class RescorerStep(nn.Module):
    """One step of a language model for the nodes of one depth of a trie."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        layers = cast(Sequence[nn.RNNBase], model.layers)
        self.layers = nn.ModuleList(RecurrentStep(layer, cell=model.cell) for layer in layers)
        first = cast(RecurrentStep, self.layers[0])
        with torch.no_grad():
            self.first_gates = nn.Parameter(first.inputs(model.embedding.weight))
        self.head = nn.Linear(model.embedding.embedding_dim, model.embedding.num_embeddings)
        self.head.weight, self.head.bias = model.embedding.weight, model.bias

    @property
    def states(self) -> list[tuple[str, int]]:
        """Name and size of each state."""
        return [
            (f"{name}_{i}", layer.recurrent.in_features)
            for i, layer in enumerate(cast(Sequence[RecurrentStep], self.layers))
            for name in layer.state_names
        ]

    def forward(
        self, tokens: Tensor, parents: Tensor, rows: Tensor, wanted: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        """Step; the arguments are those of `service.rescorer.Level`, and the states above.

        Returns:
            Log probability of each edge, float32, (edge,), and each node's new states.
        """
        gates = self.first_gates[tokens]  # (node, gate * unit)
        after: list[Tensor] = []
        left = [state[parents] for state in states]
        for i, layer in enumerate(cast(Sequence[RecurrentStep], self.layers)):
            if i:
                gates = layer.inputs(after[-len(layer.state_names)])
            new = layer(gates, [left.pop(0) for _ in layer.state_names])
            after += new
        log_probs = self.head(after[-len(layer.state_names)]).log_softmax(-1)  # (node, piece)
        return (log_probs[rows, wanted], *after)


def export_rescorer(checkpoint: Path, graph: Path, *, int8: bool = True) -> None:
    """Write the averaged weights of a checkpoint as a graph, or write nothing.

    Args:
        checkpoint: `best.pt` or `last.pt` of a run of `train_language_model`.
        graph: the ONNX file to write.
        int8: keep and multiply the weights in 8 bits: a quarter of the size, and faster.

    Raises:
        TrainingError: the checkpoint is missing, damaged or of another model.
        ExportError: the graph does not compute what the model computes.
    """
    model, pieces = load_language_model(checkpoint)
    write_checked(
        graph,
        partial(_write_graph, RescorerStep(model), pieces),
        partial(_measure_graph, model),
        largest=LARGEST_DIFFERENCE,
        compress=quantise_products if int8 else None,
        mean=LARGEST_INT8_DIFFERENCE,
    )


def quantise_products(path: Path) -> None:
    """Keep tables and matrices as int8 with a scale a row, and multiply in 8 bits."""
    model = onnx.load(str(path))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        weight = next((name for name in node.input[:2] if name in weights), None)
        array = None if weight is None else numpy_helper.to_array(weights[weight])
        if array is None or array.ndim != 2 or array.dtype != np.float32:
            nodes.append(node)
            continue
        assert weight is not None
        quantised, scales = _quantise_rows(array)
        if node.op_type == "Gather":
            nodes += _gather_int8(node, weight)
        else:
            assert node.op_type == "Gemm", node.op_type
            nodes += _multiply_int8(node, weight)
            quantised, scales = np.ascontiguousarray(quantised.T), scales[:, 0]
        model.graph.initializer.remove(weights.pop(weight))
        for name, value in ((f"{weight}_int8", quantised), (f"{weight}_scale", scales)):
            model.graph.initializer.append(numpy_helper.from_array(value, name))
    constants = {"one": np.float32(1), "tiny": np.float32(1e-6), "middle": np.uint8(128)}
    constants["levels"] = np.float32(127)
    for name, number in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(number), f"int8_{name}"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _make_linear(layer: nn.RNNBase, name: str) -> nn.Linear:
    """The product of a layer's inputs (`ih`) or of its states (`hh`)."""
    weight: Tensor = getattr(layer, f"weight_{name}_l0")
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data = weight.detach()
    linear.bias.data = getattr(layer, f"bias_{name}_l0").detach()
    return linear


def _quantise_rows(array: _Array) -> tuple[_Array, _Array]:
    """Whole numbers, int8, (row, column), and the scale of each row, float32, (row, 1)."""
    scales = np.maximum(np.abs(array).max(axis=1, keepdims=True), 1e-12) / 127
    return np.rint(array / scales).astype(np.int8), scales.astype(np.float32)


def _gather_int8(node: onnx.NodeProto, table: str) -> list[onnx.NodeProto]:
    """Rows of a table, each multiplied by its scale."""
    rows, output = node.input[1], node.output[0]
    made = onnx.helper.make_node
    return [
        made("Gather", [f"{table}_int8", rows], [f"{output}_int8"], axis=0),
        made("Gather", [f"{table}_scale", rows], [f"{output}_scale"], axis=0),
        made("Cast", [f"{output}_int8"], [f"{output}_whole"], to=onnx.TensorProto.FLOAT),
        made("Mul", [f"{output}_whole", f"{output}_scale"], [output]),
    ]


def _multiply_int8(node: onnx.NodeProto, matrix: str) -> list[onnx.NodeProto]:
    """A matrix product of 8-bit numbers; each row of what comes in has its own scale."""
    x, _, bias = node.input
    y = node.output[0]
    made = onnx.helper.make_node
    return [
        made("Abs", [x], [f"{y}_abs"]),
        made("ReduceMax", [f"{y}_abs"], [f"{y}_peak"], axes=[1], keepdims=1),
        made("Max", [f"{y}_peak", "int8_tiny"], [f"{y}_range"]),
        made("Div", [f"{y}_range", "int8_levels"], [f"{y}_step"]),
        made("Div", [x, f"{y}_step"], [f"{y}_scaled"]),
        made("QuantizeLinear", [f"{y}_scaled", "int8_one", "int8_middle"], [f"{y}_int8"]),
        made("MatMulInteger", [f"{y}_int8", f"{matrix}_int8", "int8_middle"], [f"{y}_sum"]),
        made("Cast", [f"{y}_sum"], [f"{y}_whole"], to=onnx.TensorProto.FLOAT),
        made("Mul", [f"{y}_whole", f"{y}_step"], [f"{y}_rows"]),
        made("Mul", [f"{y}_rows", f"{matrix}_scale"], [f"{y}_product"]),
        made("Add", [f"{y}_product", bias], [y]),
    ]


def _write_graph(step: RescorerStep, pieces: Pieces, path: Path) -> None:
    """Trace a step; the numbers of nodes and edges are free."""
    names = [name for name, _ in step.states]
    inputs = [*RESCORER_INPUTS, *names]
    outputs = [RESCORER_OUTPUT, *(f"next_{name}" for name in names)]
    ids = [torch.tensor(row) for row in ([0, 1, 0], [0, 1, 1], [0, 0, 1, 2], [0, 1, 1, 0])]
    states = [torch.zeros(2, size) for _, size in step.states]
    free = {"tokens": "node", "parents": "node", "rows": "edge", "wanted": "edge"}
    free |= {RESCORER_OUTPUT: "edge"}
    free |= dict.fromkeys(names, "parent") | {f"next_{name}": "node" for name in names}
    trace(
        step,
        (*ids, *states),
        path,
        inputs=inputs,
        outputs=outputs,
        free={name: {0: axis} for name, axis in free.items()},
        metadata=pieces.to_metadata(),
    )


def _measure_graph(model: LanguageModel, path: Path) -> Difference:
    """Compare a graph with torch on sentences that the model itself makes up.

    Returns:
        The largest difference of a sentence's log probability, and the mean a piece.
    """
    sentences = _sample(model, n_sentences=_N_CHECKED, n_tokens=_CHECKED_TOKENS)
    expected = _score_tokens(model, sentences)
    actual = Rescorer(path, n_history=None).score_tokens(sentences)
    lengths = np.array([len(sentence) for sentence in sentences])
    differences = np.abs(actual - expected)
    return Difference(float(differences.max()), float((differences / lengths).mean()))


def _sample(model: LanguageModel, *, n_sentences: int, n_tokens: int) -> list[list[int]]:
    """Sentences drawn from the model, of growing length, each with its end."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((n_sentences, 1), BOUNDARY_ID)
    with torch.inference_mode():
        for _ in range(n_tokens):
            logits = model(tokens)[:, -1].float()
            logits[:, BOUNDARY_ID] = -torch.inf
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, drawn], 1)
    rows = tokens[:, 1:].tolist()
    return [[*row[: i % (n_tokens + 1)], BOUNDARY_ID] for i, row in enumerate(rows)]


def _score_tokens(model: LanguageModel, sentences: Sequence[Sequence[int]]) -> _Array:
    """Natural log probability of each sentence, float64, (sentence,)."""
    scores = []
    for sentence in sentences:
        read, wanted = torch.tensor([[BOUNDARY_ID, *sentence[:-1]]]), torch.tensor([sentence])
        with torch.inference_mode():
            log_probs = model(read).float().log_softmax(-1)
        scores.append(log_probs.gather(2, wanted[:, :, None]).double().sum().item())
    return np.array(scores)
