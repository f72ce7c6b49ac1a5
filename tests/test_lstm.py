"""The LSTM of training: the same numbers as torch's, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.compiled import load_kernel
from training.lstm import Lstm


def _pair(size: int) -> tuple[Lstm, nn.LSTM]:
    assert load_kernel("lstm") is not None
    torch.manual_seed(0)
    ours, theirs = Lstm(5, size, batch_first=True), nn.LSTM(5, size, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _differentiate(network: nn.LSTM, *, n_sequences: int, n_frames: int) -> list[torch.Tensor]:
    """Outputs, last state, and the gradients of all that goes in."""
    torch.manual_seed(1)
    size = network.hidden_size
    x = torch.randn(n_sequences, n_frames, 5, requires_grad=True)
    state = (
        torch.randn(1, n_sequences, size, requires_grad=True),
        torch.randn(1, n_sequences, size, requires_grad=True),
    )
    y, (h, c) = network(x, state)
    loss = (y * torch.randn(y.shape)).sum() + (h * torch.randn(h.shape)).sum() + c.square().sum()
    loss.backward()
    gradients = [leaf.grad for leaf in (x, *state, *network.parameters())]
    return [y, h, c, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize(
    ("size", "n_sequences", "n_frames"), [(7, 3, 11), (64, 1, 1), (64, 17, 9), (40, 8, 5)]
)
def test_outputs_and_gradients_equal_those_of_torch(
    size: int, n_sequences: int, n_frames: int, n_threads: int
) -> None:
    """Also of the state, which windows hand on."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        ours, theirs = (
            _differentiate(network, n_sequences=n_sequences, n_frames=n_frames)
            for network in _pair(size)
        )
    finally:
        torch.set_num_threads(before)
    assert len(ours) == 10
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [24, 64])
def test_under_bfloat16_stays_near_float32(size: int) -> None:
    """64 units run on a matrix unit where there is one; gradients stay near as well."""
    results = []
    for network, enabled in zip(_pair(size), (True, False), strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            results.append(_differentiate(network, n_sequences=18, n_frames=30))
    for mine, expected in zip(*results, strict=True):
        assert torch.linalg.vector_norm(mine.float() - expected) < 0.02 * torch.linalg.vector_norm(
            expected
        )


def test_reads_frames_in_any_order_and_leaves_the_outputs_in_place() -> None:
    ours, theirs = _pair(7)
    x = torch.randn(2, 4, 5)
    order = torch.tensor([[3, 2, 1, 0], [1, 0, 2, 3]])
    y, (h, c) = ours.read_compiled(x, edge_every=2, order=order)
    rows = torch.arange(2).unsqueeze(1)
    expected = theirs(x[rows, order])[0]
    torch.testing.assert_close(y[rows, order], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(h, expected[:, 1::2].transpose(0, 1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(c[1:], theirs(x[rows, order])[1][1], atol=1e-6, rtol=1e-5)


def test_without_a_state_starts_at_zeros() -> None:
    ours, theirs = _pair(7)
    x = torch.randn(2, 4, 5)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0], atol=1e-6, rtol=1e-5)


def test_without_gradients_torch_computes() -> None:
    """What is exported is torch's operator."""
    ours, theirs = _pair(7)
    x = torch.randn(2, 4, 5)
    with torch.no_grad():
        assert torch.equal(ours(x)[0], theirs(x)[0])


def test_without_a_compiler_torch_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Training goes on, and says what it lacks."""
    ours, theirs = _pair(7)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("VOXGATE_CACHE", "/nowhere")
    load_kernel.cache_clear()
    try:
        x = torch.randn(2, 4, 5)
        assert torch.equal(ours(x)[0], theirs(x)[0])
    finally:
        load_kernel.cache_clear()
    assert "lstm.cpp was not compiled" in caplog.text
