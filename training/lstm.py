"""An LSTM that trains fast on processors: large products for all frames at once, one small a frame.

torch's kernel takes every frame as a cell of its own, packs the weights anew for each, and is
slowest backwards. Here only what depends on the frame before is done frame by frame, in compiled
code (`kernels/lstm.cpp`): the product with the recurrent weights, on the processor's matrix unit
where it has one, and the gates. What reads the input, and what the gradients of weights need, is
done for all frames in a few large products. `benchmarks/training_step.py` compares the two.
"""

from __future__ import annotations

import ctypes
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
        if not self.is_compiled(x) or x.shape[1] == 0:
            result: tuple[Tensor, LstmState] = nn.LSTM.forward(self, x, state)
            return result
        outputs, (output, cell) = self.read_compiled(x, state, edge_every=x.shape[1])
        return outputs, (output, cell)

    def is_compiled(self, x: Tensor) -> bool:
        """Whether the compiled code reads `x`."""
        is_training = torch.is_grad_enabled() and not torch.onnx.is_in_onnx_export()
        return is_training and not x.is_cuda and load_kernel("lstm") is not None

    def read_compiled(
        self, x: Tensor, state: LstmState | None, *, edge_every: int
    ) -> tuple[Tensor, LstmState]:
        """Read sequences by the compiled code.

        Args:
            x: see `forward`.
            state: see `forward`.
            edge_every: after how many frames, again and again, the state is wanted.

        Returns:
            Outputs (batch, frames, hidden), and the states, each (edges, batch, hidden).
        """
        w_ih, w_hh, b_ih, b_hh = (w for w in self._flat_weights if isinstance(w, Tensor))
        inputs = linear(x.transpose(0, 1), w_ih, b_ih + b_hh)  # (frames, batch, 4 * hidden)
        start = inputs.new_zeros(1, x.shape[0], self.hidden_size)
        output, cell = (start, start) if state is None else state
        outputs, edges = _Recurrence.apply(  # type: ignore[no-untyped-call]
            inputs, w_hh, output[0], cell[0], edge_every
        )
        return outputs.transpose(0, 1), (outputs[edge_every - 1 :: edge_every], edges)


class _Recurrence(torch.autograd.Function):
    """From what a cell is given in every frame to what it says; time first.

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
    ) -> tuple[Tensor, Tensor]:
        kernel = load_kernel("lstm")
        assert kernel is not None
        inputs = inputs.contiguous()
        outputs = inputs.new_empty(len(inputs) + 1, *output.shape)
        cells = torch.empty_like(outputs, dtype=torch.float32)
        outputs[0], cells[0] = output, cell
        gates = torch.empty_like(inputs)
        run = getattr(kernel, f"lstm_forward_{_STORED[inputs.dtype]}")
        run(*_describe(kernel, outputs), *addresses(weight, inputs, gates, outputs, cells))
        ctx.save_for_backward(weight, gates, outputs, cells)
        ctx.kernel, ctx.edge_every = kernel, edge_every
        return outputs[1:], cells[edge_every::edge_every].clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401  # torch's own
        d_outputs: Tensor,
        d_edges: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        weight, gates, outputs, cells = ctx.saved_tensors
        d_outputs, d_edges = d_outputs.to(gates.dtype).contiguous(), d_edges.contiguous()
        d_gates = torch.empty_like(gates)
        d_output, d_cell = torch.empty_like(cells[0]), torch.empty_like(cells[0])
        run = getattr(ctx.kernel, f"lstm_backward_{_STORED[gates.dtype]}")
        given = addresses(weight, gates, cells, d_outputs, d_edges)
        edge_every = ctypes.c_long(ctx.edge_every)
        wanted = addresses(d_gates, d_output, d_cell)
        run(*_describe(ctx.kernel, outputs), *given, edge_every, *wanted)
        d_weight = d_gates.flatten(0, 1).t() @ outputs[:-1].flatten(0, 1)
        return d_gates, d_weight.to(weight.dtype), d_output, d_cell, None


def _describe(kernel: ctypes.CDLL, outputs: Tensor) -> list[ctypes.c_long | int]:
    """Frames, sequences, units, threads, and whether products run on a matrix unit."""
    n_outputs, n_sequences, size = outputs.shape
    tiles = outputs.dtype == torch.bfloat16 and kernel.lstm_has_tiles(ctypes.c_long(size))
    return [*counts(n_outputs - 1, n_sequences, size), int(tiles)]
