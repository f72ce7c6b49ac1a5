"""What recordings are put through: babble of other speech, and a telephone line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from service.audio import resample

FloatArray = npt.NDArray[np.float32]

_N_VOICES: Final = 6
_BABBLE_SNR_DB: Final = 10.0
_MU: Final = 255.0


def make_babble(waveforms: Sequence[FloatArray], seconds: float = 60.0) -> FloatArray:
    """The speech of several recordings at a time, again and again, of unit power."""
    draw = np.random.default_rng(1)
    n_samples = int(16_000 * seconds)
    babble = np.zeros(n_samples)
    for _ in range(_N_VOICES):
        order = draw.permutation(len(waveforms))
        track = np.concatenate([waveforms[i] for i in order])
        babble += np.resize(track / max(1e-9, float(track.std())), n_samples)
    return np.asarray(babble / babble.std(), np.float32)


def add_noise(
    waveform: FloatArray, babble: FloatArray, snr_db: float | None, draw: np.random.Generator
) -> FloatArray:
    """The waveform in noise of some level below it; with half a second before and after."""
    padded = np.pad(waveform, 8_000)
    if snr_db is None:
        return padded
    start = int(draw.integers(0, len(babble)))
    noise = np.take(babble, np.arange(start, start + len(padded)), mode="wrap")
    level = float(waveform.std()) * 10 ** (-snr_db / 20)
    return np.asarray(padded + level * noise, np.float32)


def leave_clean(waveforms: list[FloatArray]) -> list[FloatArray]:
    """As recorded."""
    return waveforms


def babble(waveforms: list[FloatArray]) -> list[FloatArray]:
    """Babble of the development set's own utterances, 10 dB below each."""
    noise = make_babble(waveforms)
    draw = np.random.default_rng(1)
    return [add_noise(w, noise, _BABBLE_SNR_DB, draw) for w in waveforms]


def telephone(waveforms: list[FloatArray]) -> list[FloatArray]:
    """8 kHz, mu-law in eight bits, and back."""
    return [_through_telephone(w) for w in waveforms]


def _through_telephone(waveform: FloatArray) -> FloatArray:
    narrow = np.clip(resample(waveform, 16_000, 8_000), -1, 1)
    code = np.round((np.sign(narrow) * np.log1p(_MU * np.abs(narrow)) / np.log1p(_MU) + 1) * 127.5)
    level = code / 127.5 - 1
    heard = np.sign(level) * np.expm1(np.abs(level) * np.log1p(_MU)) / _MU
    return resample(heard.astype(np.float32), 8_000, 16_000)


CONDITIONS: Final[dict[str, Callable[[list[FloatArray]], list[FloatArray]]]] = {
    "clean": leave_clean,
    "babble": babble,
    "telephone": telephone,
}
