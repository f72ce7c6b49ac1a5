"""Augmentation of feature batches: SpecAugment, and the level and colour of a microphone."""

from __future__ import annotations

import torch
from torch import Tensor


def spec_augment(
    features: Tensor,
    feature_lengths: Tensor,
    *,
    fill: Tensor,
    n_frequency_masks: int,
    frequency_width: int,
    time_masks_per_s: float,
    time_width_frames: int,
    time_share: float,
    frames_per_s: float,
) -> Tensor:
    """Mask bands of frequency and stretches of time (Park et al. 2019).

    Args:
        features: log-mel energies, float32, (batch, time, mel).
        feature_lengths: frames of each utterance, int64, (batch,).
        fill: what a masked value becomes, usually the mean of each band, float32, (mel,).
        n_frequency_masks: frequency masks an utterance.
        frequency_width: the widest frequency mask, bands.
        time_masks_per_s: time masks a second of audio, at least one where it is above 0.
        time_width_frames: the longest time mask, frames.
        time_share: the most of an utterance that one time mask covers, a fraction.
        frames_per_s: frames of one second.

    Returns:
        A masked copy, same shape. The global torch generator draws the masks.
    """
    n_utterances, n_frames, n_mels = features.shape
    masked = torch.zeros(n_utterances, n_frames, n_mels, dtype=torch.bool, device=features.device)
    bands = torch.full((n_utterances,), n_mels)
    for _ in range(n_frequency_masks):
        width = _draw(torch.full((n_utterances,), frequency_width))
        masked |= _stretch(bands, width, n_mels).to(features.device).unsqueeze(1)
    lengths = feature_lengths.cpu()
    longest = (lengths * time_share).long().clamp(max=time_width_frames)
    n_time_masks = (lengths / frames_per_s * time_masks_per_s).round().long()
    if time_masks_per_s > 0:
        n_time_masks = n_time_masks.clamp(min=1)
    for i in range(int(n_time_masks.max())):
        width = torch.where(i < n_time_masks, _draw(longest), 0)
        masked |= _stretch(lengths, width, n_frames).to(features.device).unsqueeze(2)
    return torch.where(masked, fill, features)


def shift_level(features: Tensor, *, level_db: float, tilt_db: float) -> Tensor:
    """Imitate another distance and another microphone by adding to the log energies.

    Args:
        features: log-mel energies, float32, (batch, time, mel), natural log.
        level_db: standard deviation of the change in level, decibels.
        tilt_db: standard deviation of the change between the lowest and the highest band, decibels.

    Returns:
        A shifted copy, same shape; one draw an utterance.
    """
    n_utterances, _, n_mels = features.shape
    nepers_per_db = 0.2302585  # log energies are natural: ln(10) / 10 each decibel of power
    level = torch.randn(n_utterances, 1, 1) * level_db * nepers_per_db
    slope = torch.linspace(-0.5, 0.5, n_mels) * torch.randn(n_utterances, 1, 1) * tilt_db
    return features + (level + slope * nepers_per_db).to(features.device)


def _draw(highest: Tensor) -> Tensor:
    """A uniform integer from 0 to `highest`, both included, for each utterance."""
    return (torch.rand(len(highest)) * (highest + 1)).long()


def _stretch(lengths: Tensor, widths: Tensor, size: int) -> Tensor:
    """True on one stretch of `widths` places, somewhere inside `lengths`: (batch, size)."""
    start = _draw((lengths - widths).clamp(min=0)).unsqueeze(1)
    place = torch.arange(size).unsqueeze(0)
    return (place >= start) & (place < start + widths.unsqueeze(1))
