"""An LSTM that trains fast on processors: large products for all frames at once, one small a frame.

torch's kernel takes every frame as a cell of its own, packs the weights anew for each, and is
slowest backwards. Here only what depends on the frame before is done frame by frame, in compiled
code (`kernels/lstm.cpp`): the product with the recurrent weights, on the processor's matrix unit
where it has one, and the gates. What reads the input, and what the gradients of weights need, is
done for all frames in a few large products. `benchmarks/training_step.py` compares the two.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from training.compiled import addresses, counts, load_kernel

LstmState = tuple[Tensor, Tensor]

_STORED: Final = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class Lstm(nn.LSTM):
    """`torch.nn.LSTM` of one layer and one direction, batch first, with the same parameters.

    Where gradients are wanted on a processor it computes as this file says, else as torch does.
    """

    def forward(self, x: Tensor, state: LstmState | None = None) -> tuple[Tensor, LstmState]:
        """Read sequences.

        Args:
            x: float32 or bfloat16, (batch, frames, width).
            state: output and cell before the first frame, each (1, batch, hidden); None is zeros.

        Returns:
            Outputs (batch, frames, hidden), and the state after the last frame.
        """
        if not self.is_compiled(x):
            result: tuple[Tensor, LstmState] = nn.LSTM.forward(self, x, state)
            return result
        return self.read_compiled(x, state, edge_every=x.shape[1])

    def is_compiled(self, x: Tensor) -> bool:
        """Whether the compiled code reads `x`."""
        is_training = torch.is_grad_enabled() and not torch.onnx.is_in_onnx_export()
        is_here = not x.is_cuda and x.shape[1] > 0
        return is_training and is_here and load_kernel("lstm") is not None

    def read_compiled(
        self,
        x: Tensor,
        state: LstmState | None = None,
        *,
        edge_every: int,
        order: Tensor | None = None,
    ) -> tuple[Tensor, LstmState]:
        """Read sequences by the compiled code.

        Args:
            x: see `forward`.
            state: see `forward`.
            edge_every: after how many frames, again and again, the state is wanted.
            order: which frame is read first, second, …, int64, (batch, frames); None goes from
                first to last. The outputs stay where their frames are.

        Returns:
            Outputs (batch, frames, hidden), and the states, each (edges, batch, hidden).
        """
        w_ih, w_hh, b_ih, b_hh = (w for w in self._flat_weights if isinstance(w, Tensor))
        inputs = linear(x, w_ih, b_ih + b_hh)  # (batch, frames, 4 * hidden)
        start = inputs.new_zeros(1, x.shape[0], self.hidden_size)
        output, cell = (start, start) if state is None else state
        outputs, cells = _Recurrence.apply(  # type: ignore[no-untyped-call]
            inputs, w_hh, output[0], cell[0], edge_every, order
        )
        last_of_each = slice(edge_every - 1, None, edge_every)
        if order is None:
            edges = outputs[:, last_of_each]
        else:
            last = order[:, last_of_each].unsqueeze(-1)
            edges = outputs.gather(1, last.expand(-1, -1, self.hidden_size))
        return outputs, (edges.transpose(0, 1), cells)


class _Recurrence(torch.autograd.Function):
    """From what a cell is given in every frame to what it says.

    The gates are in torch's order: input, forget, cell, output. Cells are float32, all else is of
    the inputs' type.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  # torch's own
        inputs: Tensor,
        weight: Tensor,
        output: Tensor,
        cell: Tensor,
        edge_every: int,
        order: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        inputs = inputs.contiguous()
        output, cell = output.to(inputs.dtype).contiguous(), cell.float().contiguous()
        order = None if order is None else order.contiguous()
        n_sequences, n_frames, _ = inputs.shape
        shape = n_sequences, n_frames, len(weight.t())
        gates, outputs, before = (
            torch.empty_like(inputs),
            inputs.new_empty(shape),
            inputs.new_empty(shape),
        )
        cells = torch.empty_like(outputs, dtype=torch.float32)
        edges = cells.new_empty(n_frames // edge_every, n_sequences, shape[2])
        arrays = (order, weight, inputs, output, cell, gates, outputs, before, cells, edges)
        _call("forward", outputs, edge_every, arrays)
        ctx.save_for_backward(order, weight, gates, cell, cells, before)
        ctx.edge_every = edge_every
        return outputs, edges

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401  # torch's own
        d_outputs: Tensor,
        d_edges: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        order, weight, gates, cell, cells, before = ctx.saved_tensors
        d_outputs, d_edges = d_outputs.to(gates.dtype).contiguous(), d_edges.contiguous()
        d_gates, d_output, d_cell = (torch.empty_like(x) for x in (gates, cell, cell))
        given = (order, weight, gates, cell, cells, d_outputs, d_edges)
        _call("backward", before, ctx.edge_every, (*given, d_gates, d_output, d_cell))
        d_weight = d_gates.flatten(0, 1).t() @ before.flatten(0, 1)
        return d_gates, d_weight.to(weight.dtype), d_output, d_cell, None, None


def _call(
    direction: str, outputs: Tensor, edge_every: int, arrays: Sequence[Tensor | None]
) -> None:
    """Call the compiled code; `outputs` has the shape and the type of what it works on."""
    kernel = load_kernel("lstm")
    assert kernel is not None
    size = ctypes.c_long(outputs.shape[2])
    tiles = int(outputs.dtype == torch.bfloat16 and kernel.lstm_has_tiles(size))
    run = getattr(kernel, f"lstm_{direction}_{_STORED[outputs.dtype]}")
    run(*counts(*outputs.shape), tiles, ctypes.c_long(edge_every), *addresses(*arrays))
