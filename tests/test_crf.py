"""CTC-CRF: its partition against the sum over every alignment, and what training makes of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from training.compiled import load_kernel
from training.crf import BOUNDARY, estimate_trigram, log_partition, score_labels
from training.loss import compute_losses

_N_LABELS = 4
_SEQUENCES = [[1, 2, 3], [2, 2, 1], [3], [1, 3, 3, 2], [2, 1]]


@pytest.fixture(scope="module")
def trigram() -> Tensor:
    return estimate_trigram(_SEQUENCES, _N_LABELS)


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def _implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are worked out by compiled code, and where there is no compiler by torch."""
    if request.param == "torch":
        monkeypatch.setattr("training.crf.load_kernel", lambda _: None)
    else:
        assert load_kernel("crf") is not None


def _draw_log_probs(n_utterances: int, n_frames: int, *, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n_utterances, n_frames, _N_LABELS, generator=generator)
    return logits.log_softmax(-1).requires_grad_()


def _score(trigram: Tensor, labels: list[int]) -> Tensor:
    return score_labels(
        trigram, torch.tensor([labels], dtype=torch.int64), torch.tensor([len(labels)])
    )[0]


def _sum_alignments(log_probs: Tensor, trigram: Tensor) -> Tensor:
    """Log of the summed scores, path by path, of (frames, label)."""
    scores = []
    for path in itertools.product(range(_N_LABELS), repeat=len(log_probs)):
        labels = [label for label, _ in itertools.groupby(path) if label != BOUNDARY]
        acoustic = torch.stack([log_probs[t, label] for t, label in enumerate(path)]).sum()
        scores.append(acoustic + _score(trigram, labels))
    return torch.logsumexp(torch.stack(scores), 0)


def test_trigram_is_a_distribution_over_what_follows(trigram: Tensor) -> None:
    torch.testing.assert_close(trigram.sum(-1), torch.ones(_N_LABELS, _N_LABELS))
    assert (trigram > 0).all()


def test_trigram_knows_what_it_was_shown(trigram: Tensor) -> None:
    assert int(trigram[BOUNDARY, BOUNDARY, 1:].argmax()) + 1 in {1, 2}  # what utterances start with
    assert int(trigram[1, 2].argmax()) == BOUNDARY  # after "2 1" all of them ended


def test_trigram_falls_back_to_the_bigram(trigram: Tensor) -> None:
    bigram = estimate_trigram([s[i : i + 2] for s in _SEQUENCES for i in range(len(s))], _N_LABELS)
    unseen = trigram[3, 2]  # "2 3 ·" occurs once: "1 2 3 <end>"
    assert unseen[BOUNDARY] > unseen[1]
    assert bigram.shape == trigram.shape


def test_score_of_labels_is_that_of_each_in_turn(trigram: Tensor) -> None:
    expected = (
        trigram[BOUNDARY, BOUNDARY, 2].log()
        + trigram[2, BOUNDARY, 3].log()
        + trigram[3, 2, BOUNDARY].log()
    )
    padded = torch.tensor([[2, 3, 3], [1, 1, 1]])
    scores = score_labels(trigram, padded, torch.tensor([2, 0]))
    torch.testing.assert_close(scores[0], expected)
    torch.testing.assert_close(scores[1], trigram[BOUNDARY, BOUNDARY, BOUNDARY].log())


def test_partition_sums_every_alignment(trigram: Tensor) -> None:
    log_probs, lengths = _draw_log_probs(3, 5), torch.tensor([5, 3, 1])
    partition = log_partition(log_probs, lengths, trigram)
    for i, length in enumerate(lengths.tolist()):
        expected = _sum_alignments(log_probs[i, :length], trigram)
        assert partition[i].item() == pytest.approx(expected.item(), abs=1e-5)


def test_gradient_of_the_partition_is_that_of_the_sum(trigram: Tensor) -> None:
    log_probs, lengths = _draw_log_probs(2, 5), torch.tensor([5, 3])
    weights = torch.tensor([1.0, -0.7])
    (actual,) = torch.autograd.grad(
        (log_partition(log_probs, lengths, trigram) * weights).sum(), log_probs
    )
    sums = [_sum_alignments(log_probs[i, :n], trigram) for i, n in enumerate(lengths.tolist())]
    (expected,) = torch.autograd.grad((torch.stack(sums) * weights).sum(), log_probs)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(actual.sum(-1)[0], torch.ones(5))  # posteriors of a frame


def test_partition_of_long_utterances_does_not_underflow(trigram: Tensor) -> None:
    log_probs = _draw_log_probs(1, 3_000)
    partition = log_partition(log_probs, torch.tensor([3_000]), trigram)
    (gradient,) = torch.autograd.grad(partition.sum(), log_probs)
    assert partition.isfinite().all()
    torch.testing.assert_close(gradient.sum(-1)[0], torch.ones(3_000), atol=1e-3, rtol=0)


def _losses(phone_logits: Tensor, trigram: Tensor | None, *, ctc_share: float = 0.0) -> Tensor:
    n_utterances, n_frames, _ = phone_logits.shape
    return compute_losses(
        torch.zeros(n_utterances, n_frames, 2),
        phone_logits,
        torch.tensor([n_frames] * n_utterances),
        tokens=torch.ones(n_utterances, 1, dtype=torch.int64),
        token_lengths=torch.ones(n_utterances, dtype=torch.int64),
        phones=torch.tensor([[1, 2], [3, 0]]),
        phone_lengths=torch.tensor([2, 1]),
        trigram=trigram,
        ctc_share=ctc_share,
    ).phone_nll


def test_loss_is_that_of_the_labels_among_all_sequences(trigram: Tensor) -> None:
    logits = _draw_log_probs(2, 4).detach()
    log_probs = logits.log_softmax(-1)
    ctc = _losses(logits, None)
    labels = _score(trigram, [1, 2]) + _score(trigram, [3])
    everything = sum(_sum_alignments(row, trigram) for row in log_probs)
    expected = ctc - labels + everything
    torch.testing.assert_close(_losses(logits, trigram), expected, atol=1e-4, rtol=1e-4)
    assert _losses(logits, trigram).item() > 0
    with_share = _losses(logits, trigram, ctc_share=0.1)
    torch.testing.assert_close(with_share, expected + 0.1 * ctc, atol=1e-4, rtol=1e-4)


def test_descent_makes_the_labels_the_likeliest_sequence(trigram: Tensor) -> None:
    logits = _draw_log_probs(2, 6).detach().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.1)
    first = _losses(logits, trigram).item()
    for _ in range(150):
        optimiser.zero_grad()
        loss = _losses(logits, trigram, ctc_share=0.1)
        loss.backward()
        optimiser.step()
    assert _losses(logits, trigram).item() < 0.1 * first
    paths = [[k for k, _ in itertools.groupby(row.tolist()) if k] for row in logits.argmax(-1)]
    assert paths == [[1, 2], [3]]
