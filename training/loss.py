"""The training criterion: CTC on both heads, CTC-CRF on phones where asked for, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import ctc_loss, kl_div

from service.text import BLANK
from training.crf import log_partition, score_labels


@dataclass(frozen=True)
class Losses:
    """Summed negative log likelihoods of a batch and the labels they are shared by."""

    token_nll: Tensor
    """Of the token head, scalar."""
    phone_nll: Tensor
    """Of the phone head over the utterances that are not masked, scalar; with a trigram the sum of
    CTC-CRF's and a share of CTC's."""
    token_divergence: Tensor
    """What two views of the utterances make the token head disagree, weighted, scalar."""
    phone_divergence: Tensor
    """The same of the phone head."""
    n_tokens: Tensor
    """Tokens in the batch, scalar."""
    n_phones: Tensor
    """Phones in the batch, scalar."""
    blank_share: Tensor
    """Share of frames whose best token is the blank, scalar."""

    def combine(self, phone_weight: float) -> Tensor:
        """Weighted sum of the two heads' losses, each per label."""
        token_loss = (self.token_nll + self.token_divergence) / self.n_tokens.clamp(min=1)
        phone_loss = (self.phone_nll + self.phone_divergence) / self.n_phones.clamp(min=1)
        return (1 - phone_weight) * token_loss + phone_weight * phone_loss


def compute_losses(
    token_logits: Tensor,
    phone_logits: Tensor,
    lengths: Tensor,
    *,
    tokens: Tensor,
    token_lengths: Tensor,
    phones: Tensor,
    phone_lengths: Tensor,
    trigram: Tensor | None = None,
    ctc_share: float = 0.0,
    consistency: float = 0.0,
    intermediate: Sequence[Tensor] = (),
    intermediate_weight: float = 0.0,
) -> Losses:
    """The criteria of both heads.

    Args:
        token_logits: raw, (batch, frames, token).
        phone_logits: raw, (batch, frames, phone).
        lengths: frames of each utterance, int64, (batch,).
        tokens: token ids, int64, (batch, label), padded.
        token_lengths: int64, (batch,).
        phones: phone ids, int64, (batch, label), padded.
        phone_lengths: int64, (batch,); 0 masks the utterance, as do more than fit its frames.
        trigram: of the phones, as `training.crf` estimates it: the phone head learns by CTC-CRF;
            None by CTC.
        ctc_share: what is added of CTC to CTC-CRF, which keeps it from drifting.
        consistency: weight of the divergence between two views of each utterance; above 0 the
            second half of the batch is the first half's utterances again.
        intermediate: phone logits of earlier layers, which learn by CTC.
        intermediate_weight: their share of the phone head's loss.
    """
    inside = torch.arange(token_logits.shape[1], device=lengths.device) < lengths.unsqueeze(1)
    blank = (token_logits.argmax(-1) == BLANK) & inside
    said = (phone_lengths > 0) & _fit(phones, phone_lengths, lengths)
    phone_nll = phone_logits.sum() * 0.0
    if said.any():
        labels = lengths[said], phones[said], phone_lengths[said]
        phone_nll = ctc_nll(phone_logits[said], *labels)
        if trigram is not None:
            phone_nll = phone_nll * (1 + ctc_share) + _compete(phone_logits[said], *labels, trigram)
        if intermediate:
            earlier = torch.stack([ctc_nll(logits[said], *labels) for logits in intermediate])
            phone_nll = phone_nll.lerp(earlier.mean(), intermediate_weight)
    token_divergence = phone_divergence = torch.zeros((), device=lengths.device)
    if consistency:
        token_divergence = consistency * _diverge(token_logits, inside)
        phone_divergence = consistency * _diverge(phone_logits, inside)
    return Losses(
        token_nll=ctc_nll(token_logits, lengths, tokens, token_lengths),
        phone_nll=phone_nll,
        token_divergence=token_divergence,
        phone_divergence=phone_divergence,
        n_tokens=token_lengths.sum(),
        n_phones=phone_lengths.sum(),
        blank_share=blank.sum() / inside.sum(),
    )


def ctc_nll(logits: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
    """Summed negative log likelihood by CTC; labels that do not fit into their frames cost nothing.

    Args:
        logits: raw, (batch, frames, label).
        lengths: frames of each utterance, int64, (batch,).
        labels: label ids, int64, (batch, label), padded.
        label_lengths: int64, (batch,).
    """
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)  # ctc_loss wants time first
    return ctc_loss(
        log_probs, labels, lengths, label_lengths, blank=BLANK, reduction="sum", zero_infinity=True
    )


def _fit(labels: Tensor, label_lengths: Tensor, lengths: Tensor) -> Tensor:
    """Whether labels have a CTC path: a frame each, one more between equal ones; bool, (batch,)."""
    place = torch.arange(1, max(1, labels.shape[1]), device=lengths.device)
    again = (labels[:, 1:] == labels[:, :-1]) & (place < label_lengths.unsqueeze(1))
    return label_lengths + again.sum(1) <= lengths


def _diverge(logits: Tensor, inside: Tensor) -> Tensor:
    """Kullback-Leibler divergence of each view from the other, which it learns nothing from."""
    log_probs = logits.float().log_softmax(-1)
    other = log_probs.detach().roll(len(logits) // 2, 0)
    each = kl_div(log_probs, other, reduction="none", log_target=True).sum(-1)
    return each.masked_fill(~inside, 0.0).sum()


def _compete(
    logits: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor, trigram: Tensor
) -> Tensor:
    """What CTC-CRF adds to CTC's loss: all label sequences' score over that of the labels."""
    partition = log_partition(logits.float().log_softmax(-1), lengths, trigram)
    return (partition - score_labels(trigram, labels, label_lengths)).sum()
