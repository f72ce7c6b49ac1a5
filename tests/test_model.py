"""The acoustic model: padding, lengths, context and initial weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import N_MELS, make_model
from torch import Tensor, nn

from service.text import CHARACTERS
from training.lexicon import PHONES
from training.model import AcousticModel, Cell, RecurrentLayer, output_lengths, reversal_index

_LENGTHS = (1, 2, 3, 5, 23, 40, 57)
_RIGHT_CONTEXT = {2: 3, 3: 4, 4: 3}
"""Frame j of the output sees input frames up to subsampling * j + this, by the two kernels of 3."""

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
