"""Augmentation of feature batches: SpecAugment, microphones, noise, rooms and telephones."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from service.features import FeatureSettings, mel_centres_hz
from training.config import AugmentSettings
from training.data import Batch
from training.noise import add_noise, narrow, reverberate

_TELEPHONE_HZ: Final = (300.0, 3700.0)
_LOG_ENERGY_PER_DB: Final = math.log(10) / 10


class Augmentation:
    """What happens to the features of a training batch before the model sees them."""

    def __init__(self, options: AugmentSettings, features: FeatureSettings, fill: Tensor) -> None:
        """Take the settings; `fill` is what a masked value becomes, float32, (mel,)."""
        self._options = options
        self._fill = fill
        self._frames_per_s = 1000 / features.hop_ms
        centres_hz = mel_centres_hz(features)
        self._centres_hz = torch.from_numpy(centres_hz).float()
        self._n_bands_kept = int((centres_hz < _TELEPHONE_HZ[1]).sum())
        self._n_bands_cut = int((centres_hz < _TELEPHONE_HZ[0]).sum())

    def __call__(self, batch: Batch) -> Tensor:
        """The features of a batch, changed; the global torch generator draws how."""
        options, lengths = self._options, batch.feature_lengths
        x = batch.features
        if options.warp:
            x = warp_frequencies(x, self._centres_hz, warp=options.warp)
        x = shift_level(x, level_db=options.level_db, tilt_db=options.tilt_db)
        if options.room_share:
            x = reverberate(
                x,
                share=options.room_share,
                longest_s=options.longest_room_s,
                frames_per_s=self._frames_per_s,
            )
        if options.noise_share:
            x = add_noise(
                x,
                lengths,
                share=options.noise_share,
                lowest_snr_db=options.lowest_snr_db,
                highest_snr_db=options.highest_snr_db,
                most_voices=options.most_voices,
            )
        if options.telephone_share:
            x = narrow(
                x,
                share=options.telephone_share,
                n_bands_kept=self._n_bands_kept,
                n_bands_cut=self._n_bands_cut,
            )
        return spec_augment(
            x,
            lengths,
            fill=self._fill,
            n_frequency_masks=options.n_frequency_masks,
            frequency_width=options.frequency_width,
            time_masks_per_s=options.time_masks_per_s,
            time_width_frames=options.time_width_frames,
            time_share=options.time_share,
            frames_per_s=self._frames_per_s,
        )


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


def warp_frequencies(features: Tensor, centres_hz: Tensor, *, warp: float) -> Tensor:
    """Imitate other vocal tracts by stretching the frequency axis (Jaitly and Hinton 2013).

    Args:
        features: log-mel energies, float32, (batch, time, mel).
        centres_hz: centre of each band, float32, (mel,).
        warp: the most by which a frequency changes, a fraction; one draw an utterance.

    Returns:
        A warped copy, same shape; frequencies above the last band's are taken from that.
    """
    n_utterances, n_frames, n_mels = features.shape
    factor = 1 + (2 * torch.rand(n_utterances, 1) - 1) * warp
    source_hz = centres_hz * factor  # (batch, mel)
    above = torch.searchsorted(centres_hz, source_hz).clamp(1, n_mels - 1)
    below_hz, above_hz = centres_hz[above - 1], centres_hz[above]
    share = ((source_hz - below_hz) / (above_hz - below_hz)).clamp(0, 1)

    def take(band: Tensor) -> Tensor:
        index = band.to(features.device).unsqueeze(1).expand(-1, n_frames, -1)
        return features.gather(2, index)

    return torch.lerp(take(above - 1), take(above), share.to(features.device).unsqueeze(1))


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
    level = torch.randn(n_utterances, 1, 1) * level_db * _LOG_ENERGY_PER_DB
    slope = torch.linspace(-0.5, 0.5, n_mels) * torch.randn(n_utterances, 1, 1) * tilt_db
    return features + (level + slope * _LOG_ENERGY_PER_DB).to(features.device)


def _draw(highest: Tensor) -> Tensor:
    """A uniform integer from 0 to `highest`, both included, for each utterance."""
    return (torch.rand(len(highest)) * (highest + 1)).long()


def _stretch(lengths: Tensor, widths: Tensor, size: int) -> Tensor:
    """True on one stretch of `widths` places, somewhere inside `lengths`: (batch, size)."""
    start = _draw((lengths - widths).clamp(min=0)).unsqueeze(1)
    place = torch.arange(size).unsqueeze(0)
    return (place >= start) & (place < start + widths.unsqueeze(1))
