"""Noise, rooms and telephones, imitated on log-mel energies.

Powers of independent sounds add, so what a microphone would hear is close to the sum of the mel
energies; no audio is read and no feature is computed twice. The global torch generator draws.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import conv1d, interpolate, pad

FLOOR: Final = math.log(torch.finfo(torch.float32).eps)
"""The log energy of silence: what the front end's floor makes of it."""

_FEWEST_VOICES: Final = 3
_TAIL_FRAMES: Final = 60
_CONTROL_BANDS: Final = 6
_CONTROL_EVERY_FRAMES: Final = 50


def add_noise(
    features: Tensor,
    feature_lengths: Tensor,
    *,
    share: float,
    lowest_snr_db: float,
    highest_snr_db: float,
    most_voices: int,
) -> Tensor:
    """Add babble of the batch's own utterances, coloured noise, or both.

    Args:
        features: log-mel energies, float32, (batch, time, mel), natural log.
        feature_lengths: frames of each utterance, int64, (batch,).
        share: share of the utterances that noise is added to.
        lowest_snr_db: the lowest ratio of the utterance's power to the noise's, decibels.
        highest_snr_db: the highest; each utterance draws one in between.
        most_voices: the most utterances that babble is made of; each utterance draws a number.

    Returns:
        A noisy copy, same shape.
    """
    n_utterances, n_frames, _ = features.shape
    inside = _inside(feature_lengths, n_frames).to(features)
    power = features.exp() * inside
    level = power.sum((1, 2)) / inside.sum((1, 2))
    tracks = power / level.clamp(min=1e-20)[:, None, None]
    babble = torch.zeros_like(power)
    own = torch.arange(n_utterances, device=features.device)
    fewest = min(_FEWEST_VOICES, most_voices)  # of fewer, nobody can tell who is meant
    n_voices = torch.randint(fewest, most_voices + 1, (n_utterances,), device=features.device)
    for i in range(most_voices):
        order = torch.randperm(n_utterances, device=features.device)
        shift = int(torch.randint(n_frames, ()))
        other = order != own  # nobody babbles behind himself
        heard = ((i < n_voices) & other)[:, None, None]
        babble += tracks[order].roll(shift, dims=1) * heard
    noises = torch.stack([_unit(babble, inside), _unit(_draw_coloured(features), inside)])
    kind = torch.rand(n_utterances, 1, 1, device=features.device)  # a third is a mixture
    mixture = ((kind * 3) - 1).clamp(0, 1)
    noise = noises[0] * (1 - mixture) + noises[1] * mixture
    span_db = highest_snr_db - lowest_snr_db
    snr_db = lowest_snr_db + torch.rand(n_utterances, device=features.device) * span_db
    chosen = torch.rand(n_utterances, device=features.device) < share
    gain = torch.where(chosen, level * 10 ** (-snr_db / 10), 0.0)
    return (power + noise * gain[:, None, None]).clamp(min=math.exp(FLOOR)).log()


def reverberate(features: Tensor, *, share: float, longest_s: float, frames_per_s: float) -> Tensor:
    """Let energy decay as in a room.

    Args:
        features: log-mel energies, float32, (batch, time, mel), natural log.
        share: share of the utterances.
        longest_s: the longest reverberation time (60 dB), seconds.
        frames_per_s: frames of one second.

    Returns:
        A reverberant copy, same shape; direct sound keeps its energy.
    """
    chosen = torch.rand(len(features)) < share
    if not chosen.any():
        return features
    dry = features[chosen].exp()
    n_chosen = len(dry)
    decay_s = 0.1 + torch.rand(n_chosen) * max(0.0, longest_s - 0.1)
    direct_db = torch.rand(n_chosen) * 15.0  # direct to reverberant energy
    frame = torch.arange(1, _TAIL_FRAMES + 1) / frames_per_s
    tail = 10 ** (-6.0 * frame / decay_s[:, None])
    tail *= 10 ** (-direct_db / 10)[:, None] / tail.sum(1, keepdim=True)
    kernel = torch.cat([torch.ones(n_chosen, 1), tail], 1).flip(1)  # conv1d correlates
    sound = pad(dry.permute(2, 0, 1), (_TAIL_FRAMES, 0))  # (mel, utterance, time)
    wet = conv1d(sound, kernel.unsqueeze(1).to(dry), groups=n_chosen).permute(1, 2, 0)
    result = features.clone()
    result[chosen] = wet.clamp(min=math.exp(FLOOR)).log()
    return result


def narrow(features: Tensor, *, share: float, n_bands_kept: int, n_bands_cut: int) -> Tensor:
    """Silence the bands that a telephone does not carry.

    Args:
        features: log-mel energies, float32, (batch, time, mel), natural log.
        share: share of the utterances.
        n_bands_kept: bands below the upper limit of the telephone.
        n_bands_cut: bands below its lower limit; half of the chosen utterances keep them.

    Returns:
        A copy, same shape.
    """
    n_utterances, _, n_mels = features.shape
    band = torch.arange(n_mels)
    chosen = (torch.rand(n_utterances) < share).unsqueeze(1)
    cut = (torch.rand(n_utterances) < 0.5).unsqueeze(1)  # half
    silent = chosen & ((band >= n_bands_kept) | (cut & (band < n_bands_cut)))
    return features.masked_fill(silent.unsqueeze(1).to(features.device), FLOOR)


def _draw_coloured(features: Tensor) -> Tensor:
    """Power of noise of a random colour that swells and fades: (batch, time, mel)."""
    n_utterances, n_frames, n_mels = features.shape
    slope = torch.linspace(1.5, -1.5, n_mels, device=features.device)
    colour = torch.randn(n_utterances, 1, _CONTROL_BANDS, device=features.device) * 0.8
    colour = interpolate(colour, n_mels, mode="linear", align_corners=True)  # (batch, 1, mel)
    colour = colour + slope * torch.randn(n_utterances, 1, 1, device=features.device)
    n_controls = 2 + n_frames // _CONTROL_EVERY_FRAMES
    swell = torch.randn(n_utterances, 1, n_controls, device=features.device)
    swell = swell * torch.rand(n_utterances, 1, 1, device=features.device)
    swell = interpolate(swell, n_frames, mode="linear", align_corners=True).transpose(1, 2)
    flicker = torch.randn_like(features) * 0.7  # a band of noise has few degrees of freedom
    return (colour + swell + flicker).exp()


def _unit(power: Tensor, inside: Tensor) -> Tensor:
    """Noise of unit mean power inside each utterance."""
    mean = (power * inside).sum((1, 2)) / inside.sum((1, 2))
    return power / mean.clamp(min=1e-20)[:, None, None]


def _inside(lengths: Tensor, n_frames: int) -> Tensor:
    """1 inside each utterance: bool, (batch, time, 1)."""
    frame = torch.arange(n_frames, device=lengths.device)
    return (frame < lengths.unsqueeze(1)).unsqueeze(2)
