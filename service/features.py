"""Log-mel features: the one front end of training and serving.

The definition is Kaldi's `fbank` (25 ms Povey window, 10 ms hop, DC removal, pre-emphasis, no
dither, frames only where a whole window fits), so `torchaudio.compliance.kaldi.fbank` is an
independent oracle. Arithmetic is float64 until the last step: a frame's value then does not depend
on how many frames are computed with it, and a stream equals the whole file bit for bit.
"""

from __future__ import annotations

import functools
from typing import Final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

FloatArray = npt.NDArray[np.float32]

_ENERGY_FLOOR: Final = float(np.finfo(np.float32).eps)  # Kaldi's floor under the logarithm
_BLOCK_FRAMES: Final = 256  # keeps the temporaries in the processor cache: twice the speed


class FeatureSettings(BaseModel):
    """What a bundle says about its features; serving refuses settings it cannot compute."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample_rate: int = Field(default=16_000, ge=8_000, le=48_000)
    """Rate of the waveform the features are computed from, Hz."""
    n_mels: int = Field(default=80, ge=8, le=128)
    """Mel bands, the width of a feature vector."""
    window_ms: float = Field(default=25.0, gt=0, le=1000)
    """Length of an analysis window, milliseconds."""
    hop_ms: float = Field(default=10.0, gt=0)
    """Distance between windows, milliseconds."""
    low_hz: float = Field(default=20.0, ge=0)
    """Lower edge of the lowest mel band, Hz; the upper edge is half the sample rate."""
    preemphasis: float = Field(default=0.97, ge=0, lt=1)
    """Coefficient of the first-order high-pass applied inside each window."""

    @model_validator(mode="after")
    def _check(self) -> FeatureSettings:
        if not 1 <= self.hop_samples <= self.window_samples or self.window_samples < 2:
            raise ValueError(
                f"a window of {self.window_samples} samples every {self.hop_samples}: expected a "
                "window of at least 2 samples and a hop of at least 1, no longer than the window"
            )
        if self.low_hz >= self.sample_rate / 2:
            raise ValueError(f"low_hz is {self.low_hz}, expected less than half the sample rate")
        return self

    @property
    def window_samples(self) -> int:
        """Samples of one analysis window."""
        return int(self.sample_rate * self.window_ms / 1000)

    @property
    def hop_samples(self) -> int:
        """Samples from one window's start to the next one's."""
        return int(self.sample_rate * self.hop_ms / 1000)


def log_mel(waveform: FloatArray, settings: FeatureSettings) -> FloatArray:
    """Compute the log-mel energies of a whole waveform.

    Args:
        waveform: mono samples in [-1, 1], float32, (time,), at `settings.sample_rate`.
        settings: the feature definition.

    Returns:
        Natural-log mel energies, float32, (frames, n_mels); no frames where the waveform is
        shorter than one window.
    """
    n_frames = count_frames(len(waveform), settings)
    features = np.empty((n_frames, settings.n_mels), dtype=np.float32)
    for first in range(0, n_frames, _BLOCK_FRAMES):
        last = min(first + _BLOCK_FRAMES, n_frames)
        start = first * settings.hop_samples
        stop = (last - 1) * settings.hop_samples + settings.window_samples
        features[first:last] = _log_mel_block(waveform[start:stop], settings)
    return features


def count_frames(n_samples: int, settings: FeatureSettings) -> int:
    """Number of whole windows in `n_samples` samples."""
    if n_samples < settings.window_samples:
        return 0
    return 1 + (n_samples - settings.window_samples) // settings.hop_samples


def mel_centres_hz(settings: FeatureSettings) -> npt.NDArray[np.float64]:
    """Centre frequency of each mel band, Hz, float64, (n_mels,)."""
    return np.asarray(700.0 * np.expm1(_mel_edges(settings)[1:-1] / 1127.0))


class FeatureStream:
    """Computes the features of a stream piece by piece.

    The concatenated outputs equal `log_mel` of the concatenated inputs, whatever the pieces.
    """

    def __init__(self, settings: FeatureSettings) -> None:
        self._settings = settings
        self._pending = np.zeros(0, dtype=np.float32)

    def push(self, waveform: FloatArray) -> FloatArray:
        """Take the next samples, float32 (time,); return the new frames, float32 (frames, mel)."""
        samples = np.concatenate([self._pending, waveform])
        n_frames = count_frames(len(samples), self._settings)
        self._pending = samples[n_frames * self._settings.hop_samples :].copy()
        return log_mel(samples, self._settings)


def _log_mel_block(waveform: FloatArray, settings: FeatureSettings) -> FloatArray:
    n_samples, step = settings.window_samples, waveform.strides[0]
    windows = np.lib.stride_tricks.as_strided(
        waveform,
        (count_frames(len(waveform), settings), n_samples),
        (settings.hop_samples * step, step),
    )
    frames = windows.astype(np.float64)  # (frames, window)
    frames -= frames.mean(axis=1, keepdims=True)
    frames[:, 1:] -= settings.preemphasis * frames[:, :-1]
    frames[:, 0] -= settings.preemphasis * frames[:, 0]
    frames *= _povey_window(n_samples)
    spectrum = np.fft.rfft(frames, _n_fft(settings))
    power = spectrum.real**2 + spectrum.imag**2  # (frames, n_fft / 2 + 1)
    energies = power @ _mel_filters(settings)  # (frames, mel)
    log_energies: FloatArray = np.log(np.maximum(energies, _ENERGY_FLOOR)).astype(np.float32)
    return log_energies


def _n_fft(settings: FeatureSettings) -> int:
    return 1 << (settings.window_samples - 1).bit_length()


@functools.cache
def _povey_window(n_samples: int) -> npt.NDArray[np.float64]:
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_samples) / (n_samples - 1))
    return np.asarray(hann**0.85)


@functools.cache
def _mel_filters(settings: FeatureSettings) -> npt.NDArray[np.float64]:
    """Triangles on Kaldi's mel scale, float64, (n_fft / 2 + 1, n_mels)."""
    n_fft = _n_fft(settings)
    edges = _mel_edges(settings)
    mel = _hz_to_mel(np.arange(n_fft // 2 + 1) * settings.sample_rate / n_fft)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (mel - left) / (centre - left)
    falling = (right - mel) / (right - centre)
    filters = np.maximum(0.0, np.minimum(rising, falling))
    filters[-1] = 0.0  # Kaldi leaves the Nyquist bin out
    return np.asarray(filters)


def _mel_edges(settings: FeatureSettings) -> npt.NDArray[np.float64]:
    """Where the triangles begin, peak and end, mel, float64, (n_mels + 2,)."""
    low, high = _hz_to_mel(settings.low_hz), _hz_to_mel(settings.sample_rate / 2)
    return np.linspace(low, high, settings.n_mels + 2)


def _hz_to_mel(hz: float | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(1127.0 * np.log1p(np.asarray(hz) / 700.0))
