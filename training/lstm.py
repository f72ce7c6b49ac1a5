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

    def forward(
        self, x: Tensor, state: LstmState | None = None
    ) -> tuple[Tensor, LstmState]:
        """Read sequences.

        Args:
            x: float32 or bfloat16, (batch, frames, width).
            state: output and cell before the first frame, each (1, batch, hidden); None is zeros.

        Returns:
            Outputs (batch, frames, hidden), and the state after the last frame.
        """
        is_training = torch.is_grad_enabled() and not torch.onnx.is_in_onnx_export()
        kernel = load_kernel("lstm") if is_training and not x.is_cuda else None
        if kernel is None or x.shape[1] == 0:
            result: tuple[Tensor, LstmState] = nn.LSTM.forward(self, x, state)
            return result
        w_ih, w_hh, b_ih, b_hh = (w for w in self._flat_weights if isinstance(w, Tensor))
        inputs = linear(x.transpose(0, 1), w_ih, b_ih + b_hh)  # (frames, batch, 4 * hidden)
        start = inputs.new_zeros(1, x.shape[0], self.hidden_size)
        output, cell = (start, start) if state is None else state
        outputs, cell = _Recurrence.apply(  # type: ignore[no-untyped-call]
            inputs, w_hh, output[0], cell[0], kernel
        )
        return outputs.transpose(0, 1), (outputs[-1:], cell.unsqueeze(0))


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
        kernel: ctypes.CDLL,
    ) -> tuple[Tensor, Tensor]:
        inputs = inputs.contiguous()
        outputs = inputs.new_empty(len(inputs) + 1, *output.shape)
        cells = torch.empty_like(outputs, dtype=torch.float32)
        outputs[0], cells[0] = output, cell
        gates = torch.empty_like(inputs)
        run = getattr(kernel, f"lstm_forward_{_STORED[inputs.dtype]}")
        run(*_describe(kernel, outputs), *addresses(weight, inputs, gates, outputs, cells))
        ctx.save_for_backward(weight, gates, outputs, cells)
        ctx.kernel = kernel
        return outputs[1:], cells[-1].to(cell.dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401  # torch's own
        d_outputs: Tensor,
        d_cell: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        weight, gates, outputs, cells = ctx.saved_tensors
        d_outputs = d_outputs.to(gates.dtype).contiguous()
        d_gates, d_output = torch.empty_like(gates), torch.empty_like(cells[0])
        d_cell = d_cell.float().clone()
        run = getattr(ctx.kernel, f"lstm_backward_{_STORED[gates.dtype]}")
        arrays = (weight, gates, cells, d_outputs, d_gates, d_output, d_cell)
        run(*_describe(ctx.kernel, outputs), *addresses(*arrays))
        d_weight = d_gates.flatten(0, 1).t() @ outputs[:-1].flatten(0, 1)
        return d_gates, d_weight.to(weight.dtype), d_output, d_cell, None


def _describe(kernel: ctypes.CDLL, outputs: Tensor) -> list[ctypes.c_long | int]:
    """Frames, sequences, units, threads, and whether products run on a matrix unit."""
    n_outputs, n_sequences, size = outputs.shape
    tiles = outputs.dtype == torch.bfloat16 and kernel.lstm_has_tiles(ctypes.c_long(size))
    return [*counts(n_outputs - 1, n_sequences, size), int(tiles)]
