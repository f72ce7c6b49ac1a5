"""The acoustic model: strided convolutions, recurrent layers, two CTC heads.

Log-mel features → two convolutions (subsampling 2, 3 or 4) → N residual recurrent layers with
layer norm and dropout → logits over tokens and, beside them, over phones. The two directions of a
layer are two recurrent networks; the reverse one reads each sequence flipped by its own length, so
padding never reaches it, no sequence is packed, and the graph exports to ONNX with free axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, TypeVar

import torch
from torch import Tensor, nn

Cell = Literal["lstm", "gru", "rnn"]

_CELLS: Final[dict[Cell, Callable[..., nn.RNNBase]]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
}
_STRIDES: Final[dict[int, tuple[int, int]]] = {2: (2, 1), 3: (3, 1), 4: (2, 2)}
_KERNEL: Final = 3


class AcousticModel(nn.Module):
    """Maps log-mel features to CTC logits over tokens and over phones."""

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self,
        *,
        n_mels: int,
        n_tokens: int,
        n_phones: int,
        cell: Cell = "lstm",
        n_layers: int = 4,
        hidden_size: int = 320,
        bidirectional: bool = True,
        subsampling: int = 4,
        n_channels: int = 32,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        width = hidden_size * (2 if bidirectional else 1)
        self.register_buffer("feature_mean", torch.zeros(n_mels))
        self.register_buffer("feature_std", torch.ones(n_mels))
        self.convolutions = ConvolutionalSubsampling(
            n_mels=n_mels, n_channels=n_channels, subsampling=subsampling, width=width
        )
        self.layers = nn.ModuleList(
            RecurrentLayer(width, hidden_size, cell=cell, bidirectional=bidirectional)
            for _ in range(n_layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.token_head = nn.Linear(width, n_tokens)
        self.phone_head = nn.Linear(width, n_phones)

    def forward(self, features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the logits of both heads.

        Args:
            features: log-mel energies, float32, (batch, time, mel), natural log; what lies behind
                an utterance's length is ignored.
            feature_lengths: frames of each utterance, int64, (batch,).

        Returns:
            Token logits (batch, frames, token), phone logits (batch, frames, phone), both raw, and
            the frames of each utterance after subsampling, int64, (batch,).
        """
        x = (features - self.feature_mean) / self.feature_std
        x, lengths = self.convolutions(x, feature_lengths)  # (batch, frames, width)
        reverse = reversal_index(lengths, x.shape[1])
        x = self.dropout(x)
        for layer in self.layers:
            x = x + self.dropout(layer(x, reverse))
        x = self.dropout(self.norm(x))
        return self.token_head(x), self.phone_head(x), lengths


class ConvolutionalSubsampling(nn.Module):
    """Two convolutions over time and frequency that shorten time by `subsampling`."""

    def __init__(self, *, n_mels: int, n_channels: int, subsampling: int, width: int) -> None:
        super().__init__()
        if subsampling not in _STRIDES:
            raise ValueError(f"subsampling is {subsampling}, expected one of {sorted(_STRIDES)}")
        self.strides = _STRIDES[subsampling]
        first, second = self.strides
        self.first = nn.Conv2d(1, n_channels, _KERNEL, stride=(first, 2), padding=1)
        self.second = nn.Conv2d(n_channels, n_channels, _KERNEL, stride=(second, 2), padding=1)
        n_bands = _strided_length(_strided_length(n_mels, 2), 2)
        self.projection = nn.Linear(n_channels * n_bands, width)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, time, mel) → (batch, frames, width) and the lengths in frames."""
        x = _zero_padding(x, lengths).unsqueeze(1)  # (batch, 1, time, mel)
        for convolution, stride in zip((self.first, self.second), self.strides, strict=True):
            x = torch.relu(convolution(x))  # (batch, channel, time / stride, mel / 2)
            lengths = _strided_length(lengths, stride)
            x = _zero_padding(x.transpose(1, 2), lengths).transpose(1, 2)
        x = x.transpose(1, 2).flatten(2)  # (batch, frames, channel * band)
        return self.projection(x), lengths


class RecurrentLayer(nn.Module):
    """Layer norm, then one recurrent network a direction: (batch, frames, width) → the same."""

    def __init__(self, width: int, hidden_size: int, *, cell: Cell, bidirectional: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.ahead = _make_network(cell, width, hidden_size)
        self.back = _make_network(cell, width, hidden_size) if bidirectional else None

    def forward(self, x: Tensor, reverse: Tensor) -> Tensor:
        """Apply the layer; `reverse` is `reversal_index` of the utterances' lengths."""
        x = self.norm(x)
        ahead: Tensor = self.ahead(x)[0]
        if self.back is None:
            return ahead
        back, _ = self.back(_gather_frames(x, reverse))
        return torch.cat([ahead, _gather_frames(back, reverse)], dim=-1)


def reversal_index(lengths: Tensor, n_frames: int) -> Tensor:
    """Where each frame comes from when every sequence is flipped by its own length.

    Args:
        lengths: frames of each sequence, int64, (batch,).
        n_frames: frames of the padded batch.

    Returns:
        Indices into time, int64, (batch, frames); its own inverse. Padding stays in place.
    """
    frame = torch.arange(n_frames, device=lengths.device).unsqueeze(0)
    mirrored = lengths.unsqueeze(1) - 1 - frame
    return torch.where(mirrored >= 0, mirrored, frame)


def output_lengths(feature_lengths: Tensor, subsampling: int) -> Tensor:
    """Frames after subsampling of utterances of `feature_lengths` feature frames."""
    for stride in _STRIDES[subsampling]:
        feature_lengths = _strided_length(feature_lengths, stride)
    return feature_lengths


_Length = TypeVar("_Length", int, Tensor)


def _strided_length(length: _Length, stride: int) -> _Length:
    return (length - 1) // stride + 1


def _zero_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """Zero what lies behind each sequence's length; time is axis 1 of `x`."""
    outside = torch.arange(x.shape[1], device=x.device).unsqueeze(0) >= lengths.unsqueeze(1)
    return x.masked_fill(outside.reshape(outside.shape + (1,) * (x.dim() - 2)), 0.0)


def _gather_frames(x: Tensor, index: Tensor) -> Tensor:
    return torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _make_network(cell: Cell, width: int, hidden_size: int) -> nn.RNNBase:
    """Orthogonal recurrent weights, Glorot input weights, zero biases, forget gates open."""
    network: nn.RNNBase = _CELLS[cell](width, hidden_size, batch_first=True)
    for name, parameter in network.named_parameters():
        if name.startswith("weight_hh"):
            for gate in parameter.data.split(network.hidden_size):
                nn.init.orthogonal_(gate)
        elif name.startswith("weight_ih"):
            for gate in parameter.data.split(network.hidden_size):
                nn.init.xavier_uniform_(gate)
        else:
            nn.init.zeros_(parameter)
    if isinstance(network, nn.LSTM):  # torch orders the gates input, forget, cell, output
        forget = slice(network.hidden_size, 2 * network.hidden_size)
        dict(network.named_parameters())["bias_ih_l0"].data[forget].fill_(1.0)
    return network
