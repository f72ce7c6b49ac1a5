"""CTC-CRF: CTC whose label sequences compete under a phone n-gram (Xiang and Ou 2019).

CTC normalises every frame by itself, so a network of little data learns to be sure of what is
frequent. Here the score of an utterance's labels is normalised over all label sequences instead,
each weighted by a trigram of phones: what lattice-free MMI does, with CTC's topology. The sum over
all sequences needs a state for every pair of last phones, with and without a blank after them, and
runs as batched matrix products in the probability domain, rescaled at every frame.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import pad

from training.compiled import addresses, counts, load_kernel

BOUNDARY = 0
"""Id of the start and the end of an utterance in the trigram; in the labels it is the blank."""


def estimate_trigram(sequences: Iterable[Sequence[int]], n_labels: int) -> Tensor:
    """Estimate a label trigram, interpolated with its bigram and unigram (Witten and Bell 1991).

    Args:
        sequences: label ids from 1 to `n_labels` - 1.
        n_labels: labels, the blank included.

    Returns:
        P(third | first, second), float32, (second, first, third), `BOUNDARY` for the start and the
        end. The middle comes first, as the sums run over the first label for each of them.
    """
    counts: Counter[tuple[int, int, int]] = Counter()
    for sequence in sequences:
        padded = [BOUNDARY, BOUNDARY, *sequence, BOUNDARY]
        counts.update(zip(padded, padded[1:], padded[2:], strict=False))
    trigrams = torch.zeros(n_labels, n_labels, n_labels, dtype=torch.float64)
    for (first, second, third), count in counts.items():
        trigrams[second, first, third] = count
    unigram = trigrams.sum((0, 1)) + 1.0
    unigram /= unigram.sum()
    bigram = _interpolate(trigrams.sum(1), unigram)
    return _interpolate(trigrams, bigram.unsqueeze(1)).float()


def score_labels(trigram: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
    """Log probability of label sequences, their ends included.

    Args:
        trigram: what `estimate_trigram` returns.
        labels: label ids, int64, (batch, label), padded with anything.
        label_lengths: int64, (batch,).

    Returns:
        Natural log, float32, (batch,).
    """
    place = torch.arange(labels.shape[1] + 1, device=labels.device)
    inside = place < label_lengths.unsqueeze(1)
    third = pad(labels, (0, 1)).masked_fill(~inside, BOUNDARY)
    padded = pad(third, (2, 0), value=BOUNDARY)
    first, second = padded[:, :-2], padded[:, 1:-1]
    scores = trigram[second, first, third].log()
    return (scores * (place <= label_lengths.unsqueeze(1))).sum(1)


def log_partition(log_probs: Tensor, lengths: Tensor, trigram: Tensor) -> Tensor:
    """Log of the summed scores of every alignment of every label sequence.

    Args:
        log_probs: log potentials of the labels, float32, (batch, frames, label), blank first.
        lengths: frames of each utterance, int64, (batch,), at least 1.
        trigram: what `estimate_trigram` returns.

    Returns:
        Natural log, float32, (batch,); differentiable with respect to `log_probs`.
    """
    kernel = None if log_probs.is_cuda else load_kernel("crf")
    if kernel is not None:
        return _CompiledLogPartition.apply(  # type: ignore[no-any-return,no-untyped-call]
            log_probs, lengths, trigram, kernel
        )
    return _LogPartition.apply(  # type: ignore[no-any-return,no-untyped-call]
        log_probs, lengths, trigram
    )


class _CompiledLogPartition(torch.autograd.Function):
    """The same as `_LogPartition`, by `kernels/crf.cpp`; both directions in one go."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  # torch's own
        log_probs: Tensor,
        lengths: Tensor,
        trigram: Tensor,
        kernel: ctypes.CDLL,
    ) -> Tensor:
        probs = log_probs.detach().float().exp().contiguous()
        totals = probs.new_empty(len(probs))
        posteriors = torch.zeros_like(probs) if ctx.needs_input_grad[0] else None
        arrays = (trigram, probs, lengths.contiguous(), totals, posteriors)
        kernel.crf_sum(*counts(*probs.shape), *addresses(*arrays))
        ctx.save_for_backward(posteriors)
        return totals

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401  # torch's own
        d_totals: Tensor,
    ) -> tuple[Tensor, None, None, None]:
        (posteriors,) = ctx.saved_tensors
        return posteriors * d_totals[:, None, None], None, None, None


class _LogPartition(torch.autograd.Function):
    """Forward algorithm; backward, the posterior of each label in each frame.

    States are (last label, utterance, label before it), once for frames of the last label and once
    for blanks after it.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, log_probs: Tensor, lengths: Tensor, trigram: Tensor) -> Tensor:
        probs = log_probs.detach().float().exp().permute(1, 2, 0).contiguous()
        n_frames, n_labels, n_utterances = probs.shape
        blank, label = _split(probs)
        again = _said_twice(trigram)
        spoken = probs.new_zeros(n_frames + 1, n_labels, n_utterances, n_labels)
        silent = torch.zeros_like(spoken)
        silent[0, BOUNDARY, :, BOUNDARY] = 1.0
        scales = probs.new_ones(n_frames, n_utterances)
        for t in range(n_frames):
            said, paused = spoken[t], silent[t]
            both = said + paused
            arriving = torch.bmm(both, trigram)  # (last, utterance, next)
            arriving.diagonal(dim1=0, dim2=2).sub_((said * again.unsqueeze(1)).sum(2).T)
            now_said = (arriving.permute(2, 1, 0) + said) * label[t]
            now_paused = both * blank[t]
            inside = t < lengths
            scale = torch.where(inside, (now_said + now_paused).sum((0, 2)), 1.0)
            scales[t] = scale
            torch.where(inside[:, None], now_said / scale[:, None], said, out=spoken[t + 1])
            torch.where(inside[:, None], now_paused / scale[:, None], paused, out=silent[t + 1])
        ends = trigram[:, :, BOUNDARY].unsqueeze(1)
        total = ((spoken[-1] + silent[-1]) * ends).sum((0, 2))
        ctx.save_for_backward(probs, lengths, trigram, spoken, silent, scales, total)
        return total.log() + scales.log().sum(0)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        saved = ctx.saved_tensors  # type: ignore[attr-defined]  # torch's stubs lack it
        probs, lengths, trigram, spoken, silent, scales, total = saved
        blank, label = _split(probs)
        again = _said_twice(trigram).unsqueeze(1)
        back = trigram.transpose(1, 2).contiguous()
        after_said = (trigram[:, :, BOUNDARY].unsqueeze(1) / total[:, None]).clone()
        after_paused = after_said.clone()
        posteriors = torch.zeros_like(probs)
        for t in range(len(probs) - 1, -1, -1):
            inside = (t < lengths)[:, None]
            posteriors[t] = (spoken[t + 1] * after_said).sum(2) * inside.T
            posteriors[t, BOUNDARY] = (silent[t + 1] * after_paused).sum((0, 2)) * inside[:, 0]
            stays = after_said * label[t] / scales[t][:, None]
            pauses = after_paused * blank[t] / scales[t][:, None]
            arriving = stays.permute(2, 1, 0).contiguous()  # (last, utterance, next)
            pauses += torch.bmm(arriving, back)
            same = arriving.diagonal(dim1=0, dim2=2).T.unsqueeze(2) * again
            after_said = torch.where(inside, pauses + stays - same, after_said)
            after_paused = torch.where(inside, pauses, after_paused)
        return posteriors.permute(2, 0, 1) * gradients[0][:, None, None], None, None


def _split(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Blank (frames, utterance, 1) and labels (frames, label, utterance, 1), the blank's zero."""
    label = probs.clone()
    label[:, BOUNDARY] = 0.0
    return probs[:, BOUNDARY].unsqueeze(-1), label.unsqueeze(-1)


def _said_twice(trigram: Tensor) -> Tensor:
    """P(label | label before it, label): it needs a blank between, (label, label before it)."""
    return trigram.diagonal(dim1=0, dim2=2).T.contiguous()


def _interpolate(counts: Tensor, lower: Tensor) -> Tensor:
    n_seen = counts.sum(-1, keepdim=True)
    n_types = (counts > 0).sum(-1, keepdim=True).clamp(min=1)
    return (counts + n_types * lower) / (n_seen + n_types)
