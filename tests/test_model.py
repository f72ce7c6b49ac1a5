"""The acoustic model: padding, lengths, context, reading window by window, initial weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny import N_MELS, make_model
from torch import Tensor, nn

from service.text import CHARACTERS
from training.compiled import load_kernel
from training.lexicon import PHONES
from training.model import (
    AcousticModel,
    Cell,
    Chunking,
    Dropout,
    RecurrentLayer,
    output_lengths,
    reversal_index,
)

_LENGTHS = (1, 2, 3, 5, 23, 40, 57)
_RIGHT_CONTEXT = {2: 3, 3: 4, 4: 3}
"""Frame j of the output sees input frames up to subsampling * j + this, by the two kernels of 3."""

_CHUNKINGS = (Chunking(1, 1), Chunking(3, 2), Chunking(5, 7))

_every_kind = pytest.mark.parametrize(
    ("cell", "bidirectional", "subsampling"),
    list(itertools.product(("lstm", "gru", "rnn"), (True, False), (2, 3, 4))),
)


def _draw_utterances() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(n, N_MELS, generator=generator) * 3 - 6 for n in _LENGTHS]


def _pad(utterances: list[Tensor], *, n_frames: int, garbage: float) -> Tensor:
    padded = torch.full((len(utterances), n_frames, N_MELS), garbage)
    for row, utterance in zip(padded, utterances, strict=True):
        row[: len(utterance)] = utterance
    return padded


@_every_kind
@torch.no_grad()
def test_forward_ignores_padding_and_strangers(
    cell: Cell, bidirectional: bool, subsampling: int
) -> None:
    model = make_model(cell=cell, bidirectional=bidirectional, subsampling=subsampling)
    utterances = _draw_utterances()
    batch = _pad(utterances, n_frames=77, garbage=1e3)
    token_logits, phone_logits, lengths = model(batch, torch.tensor(_LENGTHS))
    for i, utterance in enumerate(utterances):
        tokens, phones, n_frames = model(utterance[None], torch.tensor([len(utterance)]))
        length = int(lengths[i])
        assert [length] == n_frames.tolist() == [tokens.shape[1]]
        torch.testing.assert_close(token_logits[i, :length], tokens[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(phone_logits[i, :length], phones[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@torch.no_grad()
def test_forward_ignores_padding_that_is_no_number(garbage: float) -> None:
    model = make_model()
    utterances = _draw_utterances()
    expected = model(_pad(utterances, n_frames=60, garbage=0.0), torch.tensor(_LENGTHS))
    actual = model(_pad(utterances, n_frames=60, garbage=garbage), torch.tensor(_LENGTHS))
    for i, length in enumerate(expected[2].tolist()):
        for head in (0, 1):
            torch.testing.assert_close(
                actual[head][i, :length], expected[head][i, :length], atol=1e-5, rtol=0
            )


@torch.no_grad()
def test_forward_depends_on_every_utterance_of_a_batch() -> None:
    model = make_model()
    token_logits, phone_logits, _ = model(torch.stack(_draw_utterances()[-1:] * 2), _lengths(57, 9))
    assert not torch.allclose(token_logits[0, :3], token_logits[1, :3], atol=1e-3)
    assert token_logits.shape == (2, 15, len(CHARACTERS))
    assert phone_logits.shape == (2, 15, len(PHONES))


@_every_kind
def test_gradients_do_not_come_from_padding(
    cell: Cell, bidirectional: bool, subsampling: int
) -> None:
    model = make_model(cell=cell, bidirectional=bidirectional, subsampling=subsampling)
    utterances = _draw_utterances()
    features = _pad(utterances, n_frames=60, garbage=0.5).requires_grad_()
    token_logits, phone_logits, lengths = model(features, torch.tensor(_LENGTHS))
    inside = torch.arange(token_logits.shape[1]) < lengths[:, None]
    (token_logits[inside].square().sum() + phone_logits[inside].square().sum()).backward()
    assert features.grad is not None
    for gradient, n_frames in zip(features.grad, _LENGTHS, strict=True):
        assert gradient[n_frames:].abs().max() == 0
        seen = max(1, n_frames - 1)  # at a stride of 3 the last frame can fall between kernels
        assert (gradient[:seen].abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("subsampling", [2, 3, 4])
@torch.no_grad()
def test_output_lengths_equal_the_frames_that_come_out(subsampling: int) -> None:
    model = make_model(subsampling=subsampling, bidirectional=False, n_layers=1)
    for n_frames in range(1, 30):
        token_logits, _, lengths = model(torch.zeros(1, n_frames, N_MELS), _lengths(n_frames))
        predicted = output_lengths(_lengths(n_frames), subsampling)
        assert predicted.tolist() == lengths.tolist() == [token_logits.shape[1]]
        assert int(predicted) == -(-n_frames // subsampling)


def test_reversal_index_flips_each_sequence_by_its_own_length() -> None:
    index = reversal_index(_lengths(4, 1, 6, 0), 6)
    assert index.tolist() == [
        [3, 2, 1, 0, 4, 5],
        [0, 1, 2, 3, 4, 5],
        [5, 4, 3, 2, 1, 0],
        [0, 1, 2, 3, 4, 5],
    ]


def test_reversal_index_is_its_own_inverse() -> None:
    index = reversal_index(torch.arange(1, 14), 13)
    frames = torch.arange(13).expand(13, 13)
    assert torch.equal(frames.gather(1, index).gather(1, index), frames)


@pytest.mark.parametrize("subsampling", [2, 3, 4])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@torch.no_grad()
def test_forward_only_model_sees_no_further_than_its_convolutions(
    cell: Cell, subsampling: int
) -> None:
    model = make_model(cell=cell, bidirectional=False, subsampling=subsampling)
    features = _draw_utterances()[-1][None]
    expected, _, lengths = model(features, _lengths(features.shape[1]))
    for changed in (20, 31, 42):
        other = features.clone()
        other[:, changed:] += 3.0
        actual, _, _ = model(other, _lengths(features.shape[1]))
        seeing = subsampling * torch.arange(int(lengths)) + _RIGHT_CONTEXT[subsampling] >= changed
        difference = (actual - expected)[0].abs().amax(dim=1)
        assert difference[~seeing].max() == 0
        assert difference[seeing].min() > 1e-5


@torch.no_grad()
def test_bidirectional_model_sees_the_end_from_the_start() -> None:
    model = make_model(bidirectional=True)
    features = _draw_utterances()[-1][None]
    expected, _, _ = model(features, _lengths(57))
    features[:, -1] += 3.0
    actual, _, _ = model(features, _lengths(57))
    assert (actual - expected)[0, 0].abs().max() > 0


# Reading window by window


def _step_through(
    model: AcousticModel, features: Tensor, feature_lengths: Tensor, chunking: Chunking
) -> tuple[Tensor, Tensor]:
    """Settled logits of both heads, read window by window as a stream is, (batch, frames, unit)."""
    n_window = model.window_frames(chunking)
    n_step = chunking.n_chunk * model.convolutions.subsampling
    padded = nn.functional.pad(features, (0, 0, 0, n_window), value=1e3)
    state = model.initial_state(len(features))
    token_chunks, phone_chunks = [], []
    for first in range(0, features.shape[1], n_step):
        tokens, phones, lengths, state = model.forward_window(
            padded[:, first : first + n_window],
            (feature_lengths - first).clamp(1, n_window),
            torch.tensor(chunking.n_chunk),
            state,
        )
        assert int(lengths.max()) <= tokens.shape[1]
        token_chunks.append(tokens[:, : chunking.n_chunk])
        phone_chunks.append(phones[:, : chunking.n_chunk])
    return torch.cat(token_chunks, 1), torch.cat(phone_chunks, 1)


@_every_kind
@torch.no_grad()
def test_chunked_forward_equals_stepping_through_windows(
    cell: Cell, bidirectional: bool, subsampling: int
) -> None:
    model = make_model(cell=cell, bidirectional=bidirectional, subsampling=subsampling)
    features = _pad(_draw_utterances(), n_frames=max(_LENGTHS), garbage=1e3)
    for chunking in _CHUNKINGS:
        *heads, lengths = model(features, torch.tensor(_LENGTHS), chunking)
        stepped = _step_through(model, features, torch.tensor(_LENGTHS), chunking)
        for i, length in enumerate(lengths.tolist()):
            for actual, expected in zip(stepped, heads, strict=True):
                torch.testing.assert_close(
                    actual[i, :length], expected[i, :length], atol=1e-5, rtol=0
                )


def _read_naively(model: AcousticModel, features: Tensor, chunking: Chunking) -> Tensor:
    """Token logits of one utterance, one window and one direction after the other."""
    x, _, _ = model.convolutions(
        (features - model.feature_mean) / model.feature_std, _lengths(features.shape[1])
    )
    states = [None] * len(model.layers)
    chunks = []
    for first in range(0, x.shape[1], chunking.n_chunk):
        y = x[:, first : first + chunking.n_chunk + chunking.n_right]
        for i, layer in enumerate(model.layers):
            assert isinstance(layer, RecurrentLayer)
            assert layer.back is not None
            z = layer.norm(y)
            ahead, states[i] = layer.ahead(z[:, : chunking.n_chunk], states[i])
            if z.shape[1] > chunking.n_chunk:
                right, _ = layer.ahead(z[:, chunking.n_chunk :], states[i])
                ahead = torch.cat([ahead, right], dim=1)
            back = layer.back(z.flip(1))[0].flip(1)
            y = y + torch.cat([ahead, back], dim=2)
        chunks.append(y[:, : chunking.n_chunk])
    logits: Tensor = model.token_head(model.norm(torch.cat(chunks, dim=1)))
    return logits


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@torch.no_grad()
def test_chunked_forward_equals_reading_naively(cell: Cell) -> None:
    model = make_model(cell=cell, subsampling=3)
    for utterance in _draw_utterances():
        for chunking in _CHUNKINGS:
            actual, _, _ = model(utterance[None], _lengths(len(utterance)), chunking)
            expected = _read_naively(model, utterance[None], chunking)
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@_every_kind
@torch.no_grad()
def test_chunked_forward_ignores_padding_and_strangers(
    cell: Cell, bidirectional: bool, subsampling: int
) -> None:
    model = make_model(cell=cell, bidirectional=bidirectional, subsampling=subsampling)
    utterances = _draw_utterances()
    batch = _pad(utterances, n_frames=77, garbage=float("nan"))
    token_logits, phone_logits, lengths = model(batch, torch.tensor(_LENGTHS), Chunking(3, 2))
    for i, utterance in enumerate(utterances):
        tokens, phones, n_frames = model(
            utterance[None], torch.tensor([len(utterance)]), Chunking(3, 2)
        )
        length = int(lengths[i])
        assert [length] == n_frames.tolist() == [tokens.shape[1]]
        torch.testing.assert_close(token_logits[i, :length], tokens[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(phone_logits[i, :length], phones[0], atol=1e-5, rtol=0)


@_every_kind
@torch.no_grad()
def test_chunk_longer_than_the_utterance_equals_full_context(
    cell: Cell, bidirectional: bool, subsampling: int
) -> None:
    model = make_model(cell=cell, bidirectional=bidirectional, subsampling=subsampling)
    features = _pad(_draw_utterances(), n_frames=57, garbage=0.0)
    *expected, lengths = model(features, torch.tensor(_LENGTHS))
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    for n_chunk in (int(lengths.max()), 100):
        actual = model(features, torch.tensor(_LENGTHS), Chunking(n_chunk, 2))
        for head in (0, 1):
            torch.testing.assert_close(
                actual[head][inside], expected[head][inside], atol=1e-5, rtol=0
            )


@pytest.mark.parametrize("n_chunk", [1, 4])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@torch.no_grad()
def test_forward_only_model_reads_chunks_as_with_full_context(cell: Cell, n_chunk: int) -> None:
    model = make_model(cell=cell, bidirectional=False)
    features = _draw_utterances()[-1][None]
    expected, _, _ = model(features, _lengths(57))
    actual, _, _ = model(features, _lengths(57), Chunking(n_chunk, 1))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("subsampling", [2, 3, 4])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@torch.no_grad()
def test_chunk_sees_to_the_right_edge_of_its_window_and_no_further(
    cell: Cell, subsampling: int
) -> None:
    model = make_model(cell=cell, subsampling=subsampling)
    features = _draw_utterances()[-1][None]
    chunking = Chunking(2, 3)
    expected, _, lengths = model(features, _lengths(57), chunking)
    for changed in range(1, 57, 4):
        other = features.clone()
        other[:, changed:] += 3.0
        actual, _, _ = model(other, _lengths(57), chunking)
        chunk = torch.arange(int(lengths)) // chunking.n_chunk
        right_edge = chunk * chunking.n_chunk * subsampling + model.window_frames(chunking)
        seeing = right_edge > changed
        difference = (actual - expected)[0].abs().amax(dim=1)
        assert (difference[~seeing] == 0).all()
        assert (difference[seeing] > 0).all()


@_every_kind
def test_gradients_of_a_chunk_reach_back_to_the_start_and_ahead_to_the_right_edge(
    cell: Cell, bidirectional: bool, subsampling: int
) -> None:
    model = make_model(cell=cell, bidirectional=bidirectional, subsampling=subsampling)
    features = _draw_utterances()[-1][None].requires_grad_()
    chunking = Chunking(3, 2)
    token_logits, _, lengths = model(features, _lengths(57), chunking)
    for first in range(0, int(lengths), chunking.n_chunk):
        loss = token_logits[:, first : first + chunking.n_chunk].square().sum()
        (gradient,) = torch.autograd.grad(loss, features, retain_graph=True)
        seen = gradient[0].abs().amax(dim=1) > 0
        right_edge = first * subsampling + model.window_frames(chunking)
        assert seen[: min(right_edge, 56)].all()
        assert not seen[right_edge:].any()


@pytest.mark.parametrize("chunking", [None, Chunking(4, 2)])
@torch.no_grad()
def test_dropout_acts_on_every_layer(chunking: Chunking | None) -> None:
    model = make_model(dropout=0.5, n_layers=3)
    features, lengths = _draw_utterances()[-1][None], _lengths(57)
    expected, _, _ = model(features, lengths, chunking)
    dropped: list[bool] = []
    model.dropout.register_forward_hook(
        lambda _, arguments, output: dropped.append(not torch.equal(arguments[0], output))
    )
    assert torch.equal(model(features, lengths, chunking)[0], expected)
    assert not any(dropped)
    dropped.clear()
    model.train()
    assert not torch.equal(model(features, lengths, chunking)[0], expected)
    assert dropped == [True] * (3 + 2)  # and after the convolutions, and before the heads


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_chunks_can_be_read_in_bfloat16(cell: Cell) -> None:
    model = make_model(cell=cell).train()
    features = _pad(_draw_utterances(), n_frames=57, garbage=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        token_logits, _, _ = model(features, torch.tensor(_LENGTHS), Chunking(3, 2))
    token_logits.float().square().mean().backward()
    gradients = [p.grad for n, p in model.named_parameters() if "phone_head" not in n]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


# Statistics and initial weights


@torch.no_grad()
def test_forward_takes_features_relative_to_the_stored_statistics() -> None:
    model = make_model()
    features = _draw_utterances()[-1][None]
    expected, _, _ = model(features, _lengths(57))
    model.feature_mean.fill_(-6.0)
    model.feature_std.fill_(3.0)
    actual, _, _ = model(features * 3.0 - 6.0, _lengths(57))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_lstm_forget_gates_start_open(bidirectional: bool) -> None:
    for network in _networks(make_model(cell="lstm", bidirectional=bidirectional)):
        parameters = dict(network.named_parameters())
        bias = parameters["bias_ih_l0"] + parameters["bias_hh_l0"]
        incoming, forget, cell, outgoing = bias.split(network.hidden_size)
        assert (forget == 1).all()
        for gate in (incoming, cell, outgoing):
            assert (gate == 0).all()


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_recurrent_weights_start_orthogonal(cell: Cell) -> None:
    networks = _networks(make_model(cell=cell))
    assert len(networks) == 4
    for network in networks:
        for gate in dict(network.named_parameters())["weight_hh_l0"].split(network.hidden_size):
            torch.testing.assert_close(gate @ gate.T, torch.eye(network.hidden_size))


@pytest.mark.parametrize("subsampling", [0, 1, 5, 8])
def test_model_refuses_unknown_subsampling(subsampling: int) -> None:
    with pytest.raises(ValueError, match=rf"subsampling is {subsampling}, .*\[2, 3, 4\]"):
        make_model(subsampling=subsampling)


@torch.no_grad()
def test_dropout_acts_in_training_only() -> None:
    model = make_model(dropout=0.5)
    features, lengths = _draw_utterances()[-1][None], _lengths(57)
    assert torch.equal(model(features, lengths)[0], model(features, lengths)[0])
    model.train()
    assert not torch.equal(model(features, lengths)[0], model(features, lengths)[0])


def _lengths(*lengths: int) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int64)


def _networks(model: AcousticModel) -> list[nn.RNNBase]:
    layers = [layer for layer in model.layers if isinstance(layer, RecurrentLayer)]
    return [n for layer in layers for n in (layer.ahead, layer.back) if n is not None]


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_added_layers_change_nothing_and_learn(cell: Cell, bidirectional: bool) -> None:
    shallow = make_model(cell=cell, bidirectional=bidirectional, n_layers=1)
    deep = make_model(seed=2, cell=cell, bidirectional=bidirectional, n_layers=3)
    deep.adopt(shallow.state_dict())
    features, lengths = torch.randn(2, 40, N_MELS), torch.tensor([40, 31])
    expected = shallow.eval()(features, lengths)[0]
    actual = deep.eval()(features, lengths)[0]
    torch.testing.assert_close(actual, expected)
    actual.square().mean().backward()
    for layer in deep.layers[1:]:
        assert isinstance(layer, RecurrentLayer)
        size = layer.ahead.hidden_size
        gradient = dict(layer.ahead.named_parameters())["weight_ih_l0"].grad
        assert gradient is not None
        taken_in = gradient if cell == "rnn" else gradient[2 * size : 3 * size]
        assert len(taken_in.unique(dim=0)) == size  # each unit learns something else


def test_adopt_refuses_another_width() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_model(n_layers=3).adopt(make_model(hidden_size=12).state_dict())


@pytest.mark.parametrize("chunking", [None, Chunking(3, 2)])
def test_model_without_skips_hears_through_its_layers_alone(chunking: Chunking | None) -> None:
    model = make_model(skip=False).eval()
    lengths = torch.tensor([40, 31])
    first, second = torch.randn(2, 40, N_MELS), torch.randn(2, 40, N_MELS)
    assert not torch.equal(model(first, lengths, chunking)[0], model(second, lengths, chunking)[0])
    last = model.layers[-1]
    assert isinstance(last, RecurrentLayer)
    last.silence()
    assert torch.equal(model(first, lengths, chunking)[0], model(second, lengths, chunking)[0])


# Spelling


@torch.no_grad()
def _assert_chunks_are_read_as_windows(model: AcousticModel) -> None:
    features = _pad(_draw_utterances(), n_frames=max(_LENGTHS), garbage=1e3)
    for chunking in _CHUNKINGS:
        *heads, lengths = model(features, torch.tensor(_LENGTHS), chunking)
        stepped = _step_through(model, features, torch.tensor(_LENGTHS), chunking)
        for i, length in enumerate(lengths.tolist()):
            for actual, expected in zip(stepped, heads, strict=True):
                torch.testing.assert_close(
                    actual[i, :length], expected[i, :length], atol=1e-5, rtol=0
                )


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_spelling_model_reads_chunks_as_it_reads_windows(cell: Cell, bidirectional: bool) -> None:
    model = make_model(cell=cell, bidirectional=bidirectional, n_spelling_layers=2)
    _assert_chunks_are_read_as_windows(model)


@torch.no_grad()
def test_tokens_are_spelt_from_what_the_phone_head_says() -> None:
    model = make_model(n_spelling_layers=1)
    features = _pad(_draw_utterances(), n_frames=max(_LENGTHS), garbage=1e3)
    tokens, phones, lengths = model(features, torch.tensor(_LENGTHS))
    spelt = model.spell(phones.softmax(-1), lengths)
    for i, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(spelt[i, :length], tokens[i, :length])


@torch.no_grad()
def test_adopted_model_hears_the_same_and_spells_anew() -> None:
    plain, spelling = make_model(), make_model(seed=2, n_spelling_layers=1)
    own = spelling.token_head.weight.clone()
    spelling.adopt(plain.state_dict())
    features, lengths = torch.randn(2, 40, N_MELS), torch.tensor([40, 31])
    assert torch.equal(plain(features, lengths)[1], spelling(features, lengths)[1])
    assert torch.equal(own, spelling.token_head.weight)
    again = make_model(seed=3, n_spelling_layers=1)
    again.adopt(spelling.state_dict())
    assert torch.equal(again(features, lengths)[0], spelling(features, lengths)[0])


def test_parameters_keep_the_order_that_older_optimiser_states_know() -> None:
    names = [name for name, _ in make_model(n_spelling_layers=1).named_parameters()]
    assert list(dict.fromkeys(name.split(".")[0] for name in names)) == [
        "convolutions",
        "layers",
        "norm",
        "token_head",
        "phone_head",
        "spelling",
    ]


# Self-conditioning


def _make_conditioned_model(**arguments: Any) -> AcousticModel:
    """A model of three layers whose second reads phones and tells the third of them."""
    model = make_model(n_layers=3, conditioned_layers=(2,), **arguments)
    nn.init.normal_(model.get_parameter("conditionings.2.feedback.weight"))
    return model


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_conditioned_model_reads_chunks_as_it_reads_windows(
    cell: Cell, bidirectional: bool
) -> None:
    model = _make_conditioned_model(cell=cell, bidirectional=bidirectional, n_spelling_layers=1)
    _assert_chunks_are_read_as_windows(model)


@pytest.mark.parametrize("chunking", [None, Chunking(3, 2)])
@torch.no_grad()
def test_conditioned_layer_says_what_it_heard(chunking: Chunking | None) -> None:
    model = _make_conditioned_model()
    features, lengths = torch.randn(2, 40, N_MELS), torch.tensor([40, 31])
    heard: list[Tensor] = []
    _, phones, n_frames = model(features, lengths, chunking, heard)
    (intermediate,) = heard
    assert intermediate.shape == phones.shape
    others = torch.cat([features[:, :31], torch.full_like(features[:, 31:], 1e3)], 1)
    again: list[Tensor] = []
    model(others, lengths, chunking, again)
    n = int(n_frames[1])
    torch.testing.assert_close(again[0][1, :n], intermediate[1, :n])


@torch.no_grad()
def test_what_a_conditioned_layer_heard_reaches_the_next_ones() -> None:
    model = _make_conditioned_model()
    features, lengths = torch.randn(2, 40, N_MELS), torch.tensor([40, 31])
    before = model(features, lengths)[1]
    model.get_parameter("conditionings.2.head.bias")[1] += 3.0
    assert not torch.allclose(model(features, lengths)[1], before, atol=1e-2)


@torch.no_grad()
def test_adopted_model_begins_unconditioned_and_keeps_its_conditioning() -> None:
    plain = make_model(n_layers=3)
    conditioned = make_model(seed=2, n_layers=3, conditioned_layers=(1, 2))
    conditioned.adopt(plain.state_dict())
    features, lengths = torch.randn(2, 40, N_MELS), torch.tensor([40, 31])
    assert torch.equal(plain(features, lengths)[1], conditioned(features, lengths)[1])
    taught, again = (
        _make_conditioned_model(),
        make_model(seed=3, n_layers=3, conditioned_layers=(2,)),
    )
    again.adopt(taught.state_dict())
    assert torch.equal(again(features, lengths)[1], taught(features, lengths)[1])


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(3)
    x = torch.ones(3, 70, 501, requires_grad=True)
    y = Dropout(0.25)(x)
    y.sum().backward()
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 4 / 3]))
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())


def test_dropout_draws_from_the_seed() -> None:
    """A resumed run masks what an uninterrupted one would."""
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(Dropout(0.5)(torch.ones(9, 7)))
    assert torch.equal(*drawn)


def test_dropout_changes_nothing_outside_training() -> None:
    x = torch.randn(5, 6)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


@pytest.mark.parametrize("chunking", [None, *_CHUNKINGS])
def test_gradients_are_those_of_torch(
    chunking: Chunking | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled LSTM hands states on from window to window, and their gradients back."""
    assert load_kernel("lstm") is not None
    model = make_model(cell="lstm")
    features = _pad(_draw_utterances(), n_frames=max(_LENGTHS), garbage=0.0)
    results = []
    for kernel in (load_kernel, lambda _: None):
        monkeypatch.setattr("training.lstm.load_kernel", kernel)
        model.zero_grad()
        tokens, phones, _ = model(features, torch.tensor(_LENGTHS), chunking)
        (tokens.square().sum() + phones.square().sum()).backward()
        results.append([p.grad for p in model.parameters()])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-3)
