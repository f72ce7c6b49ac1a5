"""The acoustic model: strided convolutions, recurrent layers, two CTC heads.

Log-mel features → two convolutions (subsampling 2, 3 or 4) → N residual recurrent layers with
layer norm and dropout → logits over phones and, beside them, over tokens. Where there are spelling
layers, the tokens are not read off the sound but spelt from the phones: the phone head's
probabilities → M more recurrent layers → token logits. These can be trained on text
(`training.spelling`). The two directions of a layer are two recurrent networks; the reverse one
reads each sequence flipped by its own length, so padding never reaches it, no sequence is packed,
and the graph exports to ONNX with free axes.

One set of weights reads with full context or, for streaming, window by window (latency-controlled
BLSTM, Zhang et al. 2016): a window is a chunk of frames and some frames to its right; the forward
direction carries its state from chunk to chunk, the reverse one starts at the window's right end.
In training the reverse direction and the right contexts of all windows run as one batch, and only
the forward direction goes from chunk to chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from training.lstm import Lstm

Cell = Literal["lstm", "gru", "rnn"]
RnnState = Tensor | tuple[Tensor, Tensor]

CELLS: Final[dict[Cell, Callable[..., nn.RNNBase]]] = {
    "lstm": Lstm,
    "gru": nn.GRU,
    "rnn": nn.RNN,
}
_STRIDES: Final[dict[int, tuple[int, int]]] = {2: (2, 1), 3: (3, 1), 4: (2, 2)}
_KERNEL: Final = 3
_SPELLING: Final = ("spelling.", "token_head.")

_Apply = Callable[["RecurrentLayer", Tensor], Tensor]
"""How a recurrent layer is applied: full context, windows, or one window of streams."""


@dataclass(frozen=True)
class Chunking:
    """What the model sees at once when it reads window by window, in output frames."""

    n_chunk: int
    """Frames whose output a window settles."""
    n_right: int
    """Frames to the right of the chunk that the window sees as well."""


class StreamState(NamedTuple):
    """What a window needs of the windows before it; zeros at the start of a stream."""

    features: Tensor
    """The last feature frame, normalised, float32, (batch, 1, mel)."""
    convolved: Tensor
    """The last frame of the first convolution, float32, (batch, channel, 1, band)."""
    recurrent: Tensor
    """State of each layer's forward direction, float32, (batch, layer, part, hidden): an LSTM has
    two parts, output and cell, other cells one."""
    spelling: Tensor
    """The same of the spelling layers."""


class AcousticModel(nn.Module):
    """Maps log-mel features to CTC logits over tokens and over phones."""

    feature_mean: Tensor
    feature_std: Tensor
    convolutions: ConvolutionalSubsampling

    def __init__(
        self,
        *,
        n_mels: int,
        n_tokens: int,
        n_phones: int,
        cell: Cell = "lstm",
        n_layers: int = 4,
        n_spelling_layers: int = 0,
        hidden_size: int = 320,
        bidirectional: bool = True,
        subsampling: int = 4,
        n_channels: int = 32,
        dropout: float = 0.2,
        skip: bool = True,
        conditioned_layers: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.skip = skip
        width = hidden_size * (2 if bidirectional else 1)
        self.register_buffer("feature_mean", torch.zeros(n_mels))
        self.register_buffer("feature_std", torch.ones(n_mels))
        self.convolutions = ConvolutionalSubsampling(
            n_mels=n_mels, n_channels=n_channels, subsampling=subsampling, width=width
        )
        self.layers, spelling = (
            nn.ModuleList(
                RecurrentLayer(width, hidden_size, cell=cell, bidirectional=bidirectional)
                for _ in range(n)
            )
            for n in (n_layers, n_spelling_layers)
        )
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.token_head = nn.Linear(width, n_tokens)
        self.phone_head = nn.Linear(width, n_phones)
        self.spelling = Spelling(n_phones, spelling, width) if n_spelling_layers else None
        self.conditionings = nn.ModuleDict(
            {str(i): Conditioning(n_phones, width) for i in conditioned_layers}
        )

    def forward(
        self,
        features: Tensor,
        feature_lengths: Tensor,
        chunking: Chunking | None = None,
        intermediate: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the logits of both heads.

        Args:
            features: log-mel energies, float32, (batch, time, mel), natural log; what lies behind
                an utterance's length is ignored.
            feature_lengths: frames of each utterance, int64, (batch,).
            chunking: read window by window, as a stream is read; None reads with full context.
            intermediate: gets the phone logits of each conditioned layer, raw,
                (batch, frames, phone).

        Returns:
            Token logits (batch, frames, token), phone logits (batch, frames, phone), both raw, and
            the frames of each utterance after subsampling, int64, (batch,).
        """
        x = self._normalise(features)
        x, lengths, _ = self.convolutions(x, feature_lengths)  # (batch, frames, width)
        x = self.dropout(x)
        reading = self._begin_reading(lengths, x.shape[1], chunking)
        apply = self._applier(reading)
        heard: list[Tensor] = []
        x = self._read(self.layers, reading.open(x), apply, heard)
        if intermediate is not None:
            intermediate.extend(map(reading.close, heard))
        token_logits, phone_logits = self._apply_heads(x, apply)
        return reading.close(token_logits), reading.close(phone_logits), lengths

    def spell(
        self, probabilities: Tensor, lengths: Tensor, chunking: Chunking | None = None
    ) -> Tensor:
        """Compute token logits from what the phone head would say.

        Args:
            probabilities: of phones, float32, (batch, frames, phone).
            lengths: frames of each utterance, int64, (batch,).
            chunking: see `forward`.

        Returns:
            Token logits, raw, (batch, frames, token).
        """
        assert self.spelling is not None
        reading = self._begin_reading(lengths, probabilities.shape[1], chunking)
        x = self.spelling.embedding(reading.open(probabilities))
        x = self._read(self.spelling.layers, x, self._applier(reading))
        return reading.close(self.token_head(self.dropout(self.spelling.norm(x))))

    def forward_window(
        self, features: Tensor, feature_lengths: Tensor, n_chunk: Tensor, state: StreamState
    ) -> tuple[Tensor, Tensor, Tensor, StreamState]:
        """Compute the logits of one window of each stream.

        Args:
            features: log-mel energies of a window (chunk, right context, and `n_ahead` frames of
                the convolutions), float32, (batch, time, mel).
            feature_lengths: frames of each window, int64, (batch,), at least 1; fewer than `time`
                only where a stream ends.
            n_chunk: output frames of the chunk, int64, ().
            state: what the window before this one left, or zeros.

        Returns:
            Token logits (batch, frames, token) and phone logits (batch, frames, phone), both raw;
            how many frames the window has, int64, (batch,); and the state at the chunk's end. The
            first `n_chunk` frames are settled, those to their right know less of what follows.
        """
        x = self._normalise(features)
        x, lengths, caches = self.convolutions(x, feature_lengths, state[:2], n_chunk)
        reverse = reversal_index(lengths, x.shape[1])
        before = (*state.recurrent.unbind(1), *state.spelling.unbind(1))
        after: list[Tensor] = []

        def apply(layer: RecurrentLayer, x: Tensor) -> Tensor:
            held = _split_state(before[len(after)])
            y, edge = layer.read_windows(x, reverse, n_chunk, state=held)
            after.append(_join_state(edge))
            return y

        token_logits, phone_logits = self._apply_heads(self._read(self.layers, x, apply), apply)
        recurrent, spelling = after[: len(self.layers)], after[len(self.layers) :]
        features, convolved = caches
        after_state = StreamState(
            features=features,
            convolved=convolved,
            recurrent=torch.stack(recurrent, 1),
            spelling=torch.stack(spelling, 1) if spelling else state.spelling,
        )
        return token_logits, phone_logits, lengths, after_state

    def adopt(self, state: Mapping[str, Tensor], *, keep_token_head: bool = True) -> None:
        """Take the weights of a model of the same shape or of fewer layers.

        Layers that the other model lacks are added silent: what they give is zero, so this model
        begins by saying what the other one says. Spelling and conditioning begin as they are.

        Args:
            state: the other model's `state_dict`.
            keep_token_head: whether its token head writes the same tokens; if not, this model's
                begins as it is.

        Raises:
            RuntimeError: the models differ in more than their number of layers.
        """
        own = self.state_dict()
        added = {
            name: own[name]
            for name in own
            if name.startswith("conditionings.") and name not in state
        }
        if self.spelling is not None and "spelling.norm.weight" not in state:
            added |= {name: own[name] for name in own if name.startswith(_SPELLING)}
        if not keep_token_head:
            added |= {name: own[name] for name in own if name.startswith("token_head.")}
        n_known = len({name.split(".")[1] for name in state if name.startswith("layers.")})
        for i, layer in enumerate(_stack(self.layers)[n_known:], n_known):
            layer.silence()
            added.update({f"layers.{i}.{name}": x for name, x in layer.state_dict().items()})
        self.load_state_dict({**state, **added})

    def window_frames(self, chunking: Chunking) -> int:
        """Feature frames of a window: chunk, right context, and what the convolutions see ahead."""
        n_right = chunking.n_right if self.bidirectional else 0
        n_frames = chunking.n_chunk + n_right
        return n_frames * self.convolutions.subsampling + self.convolutions.n_ahead

    def initial_state(self, batch_size: int) -> StreamState:
        """The state at the start of `batch_size` streams."""
        n_channels, n_mels = self.convolutions.first.out_channels, len(self.feature_mean)
        first = _stack(self.layers)[0].ahead
        n_parts = 2 if isinstance(first, nn.LSTM) else 1
        n_spelling_layers = len(self.spelling.layers) if self.spelling is not None else 0
        return StreamState(
            features=torch.zeros(batch_size, 1, n_mels),
            convolved=torch.zeros(batch_size, n_channels, 1, _strided_length(n_mels, 2)),
            recurrent=torch.zeros(batch_size, len(self.layers), n_parts, first.hidden_size),
            spelling=torch.zeros(batch_size, n_spelling_layers, n_parts, first.hidden_size),
        )

    def _normalise(self, features: Tensor) -> Tensor:
        return (features - self.feature_mean) / self.feature_std

    def _apply_heads(self, x: Tensor, apply: _Apply) -> tuple[Tensor, Tensor]:
        """Logits of tokens and phones from what the layers gave; `apply` applies one more."""
        if self.spelling is None:
            x = self.dropout(self.norm(x))
            return self.token_head(x), self.phone_head(x)
        phone_logits = self.phone_head(self.dropout(self.norm(x)))
        x = self.spelling.embedding(phone_logits.softmax(-1))
        x = self._read(self.spelling.layers, x, apply)
        return self.token_head(self.dropout(self.spelling.norm(x))), phone_logits

    def _begin_reading(self, lengths: Tensor, n_frames: int, chunking: Chunking | None) -> _Reading:
        if chunking is None:
            return _Reading(lengths, n_frames)
        n_right = chunking.n_right if self.bidirectional else 0
        return _WindowedReading(lengths, n_frames, n_chunk=chunking.n_chunk, n_right=n_right)

    def _applier(self, reading: _Reading) -> _Apply:
        def apply(layer: RecurrentLayer, x: Tensor) -> Tensor:
            y: Tensor = self.dropout(reading.apply(layer, x))
            return y

        return apply

    def _read(
        self,
        layers: nn.ModuleList,
        x: Tensor,
        apply: _Apply,
        intermediate: list[Tensor] | None = None,
    ) -> Tensor:
        for i, layer in enumerate(_stack(layers), 1):
            y = apply(layer, x)
            x = x + y if self.skip else y
            if layers is self.layers and str(i) in self.conditionings:
                x, logits = self.conditionings[str(i)](x)
                if intermediate is not None:
                    intermediate.append(logits)
        return x


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` to the nearest 256th, from one random byte a value instead of four."""

    def forward(self, x: Tensor) -> Tensor:
        """Zero some values and scale the others up, in training; the shape stays."""
        n_dropped = round(256 * self.p)
        if not self.training or n_dropped == 0:
            return x
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
        drawn = words.random_(-(2**63), 2**63 - 1).view(torch.uint8)[: x.numel()].view(x.shape)
        return x * ((drawn >= n_dropped).to(x.dtype) * (256 / (256 - n_dropped)))


class Conditioning(nn.Module):
    """Reads phones off what a layer gave and lets the next ones know (Nozaki and Komatsu 2021).

    At first it adds nothing, so that it can be put into a trained model.
    """

    def __init__(self, n_phones: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_phones)
        self.feedback = nn.Linear(n_phones, width, bias=False)
        nn.init.zeros_(self.feedback.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, frames, width) → the same, changed, and phone logits (batch, frames, phone)."""
        logits = self.head(self.norm(x))
        return x + self.feedback(logits.softmax(-1)), logits


class Spelling(nn.Module):
    """What writes tokens from phones: an embedding, recurrent layers and their norm."""

    def __init__(self, n_phones: int, layers: nn.ModuleList, width: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(n_phones, width)
        self.layers = layers
        self.norm = nn.LayerNorm(width)


class _Reading:
    """How layers read whole utterances."""

    def __init__(self, lengths: Tensor, n_frames: int) -> None:
        self._reverse = reversal_index(lengths, n_frames)

    def open(self, x: Tensor) -> Tensor:
        """(batch, frames, width) → what `apply` takes."""
        return x

    def apply(self, layer: RecurrentLayer, x: Tensor) -> Tensor:
        """One layer; the shape stays."""
        y: Tensor = layer(x, self._reverse)
        return y

    def close(self, x: Tensor) -> Tensor:
        """What `apply` gives → (batch, frames, width)."""
        return x


class _WindowedReading(_Reading):
    """How layers read window by window: a batch of windows, (batch * window, frames, width)."""

    def __init__(self, lengths: Tensor, n_frames: int, *, n_chunk: int, n_right: int) -> None:
        self._n_frames, self._n_chunk, self._n_right = n_frames, n_chunk, n_right
        self._n_windows = -(-n_frames // n_chunk)
        first = torch.arange(self._n_windows, device=lengths.device) * n_chunk
        window_lengths = (lengths.unsqueeze(1) - first).clamp(0, n_chunk + n_right).flatten()
        self._reverse = reversal_index(window_lengths, n_chunk + n_right)

    def open(self, x: Tensor) -> Tensor:
        """Cut into windows that overlap by the right context."""
        n_padded = self._n_windows * self._n_chunk + self._n_right
        x = nn.functional.pad(x, (0, 0, 0, n_padded - self._n_frames))
        x = x.unfold(1, self._n_chunk + self._n_right, self._n_chunk)
        return x.transpose(2, 3).flatten(0, 1)  # unfolded: (batch, window, width, frames)

    def apply(self, layer: RecurrentLayer, x: Tensor) -> Tensor:
        """One layer; its forward direction goes from chunk to chunk."""
        return layer.read_windows(x, self._reverse, self._n_chunk, n_windows=self._n_windows)[0]

    def close(self, x: Tensor) -> Tensor:
        """Put the chunks side by side, without their right context."""
        chunks = x[:, : self._n_chunk].unflatten(0, (-1, self._n_windows))
        return torch.flatten(chunks, 1, 2)[:, : self._n_frames]


class ConvolutionalSubsampling(nn.Module):
    """Two convolutions over time and frequency that shorten time by `subsampling`."""

    def __init__(self, *, n_mels: int, n_channels: int, subsampling: int, width: int) -> None:
        super().__init__()
        if subsampling not in _STRIDES:
            raise ValueError(f"subsampling is {subsampling}, expected one of {sorted(_STRIDES)}")
        self.subsampling = subsampling
        self.strides = _STRIDES[subsampling]
        first, second = self.strides
        in_frequency = (0, 1)  # time is padded in forward, by what came before
        self.first = nn.Conv2d(1, n_channels, _KERNEL, stride=(first, 2), padding=in_frequency)
        self.second = nn.Conv2d(
            n_channels, n_channels, _KERNEL, stride=(second, 2), padding=in_frequency
        )
        n_bands = _strided_length(_strided_length(n_mels, 2), 2)
        self.projection = nn.Linear(n_channels * n_bands, width)

    @property
    def n_ahead(self) -> int:
        """Feature frames that the last output frame of a window sees beyond its own."""
        first, second = self.strides
        return first + 2 - first * second

    def forward(
        self,
        x: Tensor,
        lengths: Tensor,
        caches: tuple[Tensor, ...] | None = None,
        n_chunk: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Convolve whole utterances, or one window of each stream.

        Args:
            x: normalised features, float32, (batch, time, mel).
            lengths: frames of each utterance or window, int64, (batch,).
            caches: `features` and `convolved` of the streams' states; None at a start.
            n_chunk: output frames of a window's chunk, int64, (); None for whole utterances.

        Returns:
            (batch, frames, width), the lengths in frames, and the caches where the chunk ends.
        """
        x = _zero_padding(x, lengths).unsqueeze(1)  # (batch, 1, time, mel)
        after = []
        n_edge = None if n_chunk is None else n_chunk * self.subsampling
        for i, (convolution, stride) in enumerate(
            zip((self.first, self.second), self.strides, strict=True)
        ):
            if caches is None or n_edge is None:
                x = nn.functional.pad(x, (0, 0, 1, 1))
            else:
                before = caches[0].unsqueeze(1) if i == 0 else caches[1]
                x = nn.functional.pad(torch.cat([before, x], dim=2), (0, 0, 0, 1))
                edge = x[:, :, n_edge].unsqueeze(2)  # one frame of cache comes first
                after.append(edge.squeeze(1) if i == 0 else edge)
                n_edge = n_edge // stride
            x = torch.relu(convolution(x))  # (batch, channel, time / stride, mel / 2)
            lengths = _strided_length(lengths, stride)
            x = _zero_padding(x.transpose(1, 2), lengths).transpose(1, 2)
        x = x.transpose(1, 2).flatten(2)  # (batch, frames, channel * band)
        if n_chunk is not None and self.n_ahead > 0:  # the last frame lacks its right context
            x = x[:, :-1]
            lengths = lengths.clamp(max=x.shape[1])
        return self.projection(x), lengths, tuple(after)


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
        return self._add_reverse(ahead, x, reverse)

    def silence(self) -> None:
        """Let the layer give zeros, in a way that it can learn out of."""
        for network in (self.ahead, self.back):
            if network is not None:
                size = network.hidden_size
                # what a cell takes in is its third gate; without gates it is everything
                first = 0 if isinstance(network, nn.RNN) else 2 * size
                for parameter in network.parameters():
                    parameter.data[first : first + size] = 0.0

    def read_windows(
        self,
        x: Tensor,
        reverse: Tensor,
        n_chunk: int | Tensor,
        *,
        n_windows: int = 1,
        state: RnnState | None = None,
    ) -> tuple[Tensor, RnnState]:
        """Apply the layer to consecutive windows of each utterance or stream.

        Args:
            x: windows, float32, (batch * window, frames, width), those of one utterance together.
            reverse: `reversal_index` of the windows' lengths.
            n_chunk: frames of a chunk; the others of a window are its right context.
            n_windows: windows of each utterance.
            state: of the forward direction before the first window; None is zeros.

        Returns:
            The windows' output, same shape, and the forward direction's state after the last chunk.
        """
        x = self.norm(x)
        chunks = x[:, :n_chunk].unflatten(0, (-1, n_windows))  # (batch, window, n_chunk, width)
        ahead, edges = _read_chunks(self.ahead, chunks, state)
        if self.back is None:
            return ahead, edges[-1]
        right: Tensor = self.ahead(x[:, n_chunk:], _stack_states(edges))[0]
        return self._add_reverse(torch.cat([ahead, right], 1), x, reverse), edges[-1]

    def _add_reverse(self, ahead: Tensor, x: Tensor, reverse: Tensor) -> Tensor:
        """The outputs of both directions side by side: (batch, frames, width)."""
        if self.back is None:
            return ahead
        if isinstance(self.back, Lstm) and self.back.is_compiled(x):
            back, _ = self.back.read_compiled(x, edge_every=x.shape[1], order=reverse)
        else:
            back = _gather_frames(self.back(_gather_frames(x, reverse))[0], reverse)
        return torch.cat([ahead, back], dim=-1)


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


def _stack(layers: nn.ModuleList) -> list[RecurrentLayer]:
    return [layer for layer in layers if isinstance(layer, RecurrentLayer)]


def _strided_length(length: _Length, stride: int) -> _Length:
    return (length - 1) // stride + 1


def _zero_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """Zero what lies behind each sequence's length; time is axis 1 of `x`."""
    outside = torch.arange(x.shape[1], device=x.device).unsqueeze(0) >= lengths.unsqueeze(1)
    return x.masked_fill(outside.reshape(outside.shape + (1,) * (x.dim() - 2)), 0.0)


def _read_chunks(
    network: nn.RNNBase, chunks: Tensor, state: RnnState | None
) -> tuple[Tensor, list[RnnState]]:
    """Read chunk after chunk, each from the state that the one before left.

    Args:
        network: of one direction.
        chunks: (batch, window, n_chunk, width).
        state: before the first chunk; None is zeros.

    Returns:
        Outputs, (batch * window, n_chunk, hidden), and the state after each chunk.
    """
    if isinstance(network, Lstm) and network.is_compiled(chunks):
        n_windows, n_chunk = chunks.shape[1:3]
        assert not isinstance(state, Tensor)
        x = chunks.flatten(1, 2)
        y, (outputs, cells) = network.read_compiled(x, state, edge_every=n_chunk)
        edges = zip(outputs.split(1), cells.split(1), strict=True)
        return y.unflatten(1, (n_windows, n_chunk)).flatten(0, 1), list(edges)
    read: list[Tensor] = []
    after: list[RnnState] = []
    for chunk in chunks.unbind(1):
        y, state = network(chunk, state)
        assert state is not None
        read.append(y)
        after.append(state)
    return torch.stack(read, 1).flatten(0, 1), after


def _stack_states(states: list[RnnState]) -> RnnState:
    """States (1, batch, hidden) after each window, as one batch: (1, batch * window, hidden)."""
    if isinstance(states[0], Tensor):
        return torch.stack([s for s in states if isinstance(s, Tensor)], 2).flatten(1, 2)
    outputs, cells = zip(*states, strict=True)
    return torch.stack(outputs, 2).flatten(1, 2), torch.stack(cells, 2).flatten(1, 2)


def _split_state(state: Tensor) -> RnnState:
    """(batch, part, hidden) → what a recurrent network takes, each (1, batch, hidden)."""
    parts = [part.unsqueeze(0) for part in state.unbind(1)]
    return (parts[0], parts[1]) if len(parts) > 1 else parts[0]


def _join_state(state: RnnState) -> Tensor:
    """What a recurrent network returns → (batch, part, hidden)."""
    parts = (state,) if isinstance(state, Tensor) else state
    return torch.cat(parts).transpose(0, 1)


def _gather_frames(x: Tensor, index: Tensor) -> Tensor:
    return torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _make_network(cell: Cell, width: int, hidden_size: int) -> nn.RNNBase:
    """Orthogonal recurrent weights, Glorot input weights, zero biases, forget gates open."""
    network: nn.RNNBase = CELLS[cell](width, hidden_size, batch_first=True)
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
