"""The front end against torchaudio, and the stream against the whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch
from pydantic import ValidationError
from torchaudio.compliance import kaldi

from service.features import FeatureSettings, FeatureStream, count_frames, log_mel

FloatArray = npt.NDArray[np.float32]

EXAMPLES = Path(__file__).parent.parent / "examples"
SETTINGS = FeatureSettings()
BLOCK_FRAMES = 256  # log_mel works in blocks of this many frames
TOLERANCE = 1e-5  # log_mel's float32 results are within 5e-7


def noise(n_samples: int, *, seed: int = 0, amplitude: float = 0.1) -> FloatArray:
    draws = np.random.default_rng(seed).standard_normal(n_samples)
    return np.asarray(amplitude * draws, np.float32)


def chirp(n_samples: int, *, sample_rate: int) -> FloatArray:
    """Sweep from 50 Hz to 90 % of the Nyquist frequency, with faint noise in the empty bands."""
    seconds = np.arange(n_samples) / sample_rate
    slope = (0.45 * sample_rate - 50) / seconds[-1]
    sweep = 0.5 * np.sin(2 * np.pi * (50 * seconds + slope / 2 * seconds**2))
    return np.asarray(sweep + noise(n_samples, amplitude=1e-3), np.float32)


def speech() -> FloatArray:
    """A clip of real speech, with faint noise in the bands that mp3 leaves empty."""
    samples, sample_rate = soundfile.read(EXAMPLES / "1462-170138-0012.mp3", dtype="float32")
    assert sample_rate == SETTINGS.sample_rate
    return np.asarray(samples + noise(len(samples), amplitude=1e-3), np.float32)


@pytest.fixture(scope="module", autouse=True)
def _exact_oracle() -> Iterator[None]:
    """Let torchaudio build its mel filters in float64: in float32 they err by 1e-5 of the peak."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def torchaudio_log_mel(waveform: FloatArray, settings: FeatureSettings) -> npt.NDArray[np.float64]:
    """Kaldi's fbank by torchaudio, float64 throughout."""
    features = kaldi.fbank(
        torch.from_numpy(waveform.astype(np.float64))[None],
        dither=0.0,
        num_mel_bins=settings.n_mels,
        sample_frequency=float(settings.sample_rate),
        frame_length=settings.window_ms,
        frame_shift=settings.hop_ms,
        low_freq=settings.low_hz,
        preemphasis_coefficient=settings.preemphasis,
    )
    assert features.dtype == torch.float64
    return np.asarray(features.numpy())


def stream_log_mel(
    waveform: FloatArray, lengths: list[int], settings: FeatureSettings
) -> FloatArray:
    stream = FeatureStream(settings)
    pieces = np.split(waveform, np.cumsum(lengths)[:-1])
    return np.concatenate([stream.push(piece) for piece in pieces])


def random_lengths(n_samples: int, *, longest: int, seed: int) -> list[int]:
    """Lengths that sum to `n_samples`, zero among them."""
    rng = np.random.default_rng(seed)
    lengths = [0]
    while sum(lengths) < n_samples:
        lengths.append(min(int(rng.integers(0, longest + 1)), n_samples - sum(lengths)))
    return lengths


def test_log_mel_matches_torchaudio_on_noise() -> None:
    waveform = noise(3 * SETTINGS.sample_rate + 123)
    features = log_mel(waveform, SETTINGS)
    assert len(features) > BLOCK_FRAMES
    np.testing.assert_allclose(
        features, torchaudio_log_mel(waveform, SETTINGS), rtol=0, atol=TOLERANCE
    )


def test_log_mel_matches_torchaudio_on_chirp() -> None:
    waveform = chirp(4 * SETTINGS.sample_rate, sample_rate=SETTINGS.sample_rate)
    expected = torchaudio_log_mel(waveform, SETTINGS)
    np.testing.assert_allclose(log_mel(waveform, SETTINGS), expected, rtol=0, atol=TOLERANCE)


def test_log_mel_matches_torchaudio_on_speech() -> None:
    waveform = speech()
    expected = torchaudio_log_mel(waveform, SETTINGS)
    np.testing.assert_allclose(log_mel(waveform, SETTINGS), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "settings",
    [
        FeatureSettings(sample_rate=8_000, n_mels=40),
        FeatureSettings(sample_rate=8_000),  # some of 80 bands fall between the bins: both floor
        FeatureSettings(sample_rate=11_025),  # 275.6 samples: Kaldi cuts off, it does not round
        FeatureSettings(sample_rate=48_000),
        FeatureSettings(window_ms=32, hop_ms=16, n_mels=64, low_hz=60, preemphasis=0.9),
    ],
    ids=["8kHz-40", "8kHz-80", "11kHz", "48kHz", "other-window"],
)
def test_log_mel_matches_torchaudio_with_other_settings(settings: FeatureSettings) -> None:
    waveform = noise(2 * settings.sample_rate)
    expected = torchaudio_log_mel(waveform, settings)
    assert expected.shape[1] == settings.n_mels
    np.testing.assert_allclose(log_mel(waveform, settings), expected, rtol=0, atol=TOLERANCE)


def test_log_mel_is_near_torchaudio_in_its_own_float32() -> None:
    waveform = noise(2 * SETTINGS.sample_rate)
    torch.set_default_dtype(torch.float32)
    try:
        expected = kaldi.fbank(torch.from_numpy(waveform)[None], dither=0.0, num_mel_bins=80)
    finally:
        torch.set_default_dtype(torch.float64)
    assert expected.dtype == torch.float32
    np.testing.assert_allclose(log_mel(waveform, SETTINGS), expected.numpy(), rtol=0, atol=1e-3)


def test_log_mel_is_at_floor_on_silence() -> None:
    features = log_mel(np.zeros(SETTINGS.sample_rate, np.float32), SETTINGS)
    np.testing.assert_array_equal(features, np.log(np.finfo(np.float32).eps).astype(np.float32))


def test_log_mel_is_at_floor_on_constant_offset() -> None:
    features = log_mel(np.full(SETTINGS.sample_rate, 0.7, np.float32), SETTINGS)
    np.testing.assert_array_equal(features, np.log(np.finfo(np.float32).eps).astype(np.float32))


def test_log_mel_moves_down_by_its_gain_when_quieter() -> None:
    waveform = noise(SETTINGS.sample_rate)
    quieter = log_mel(waveform / 4, SETTINGS)
    np.testing.assert_allclose(log_mel(waveform, SETTINGS) - quieter, np.log(16), atol=1e-4)


def test_log_mel_is_float32_of_frames_by_mels() -> None:
    features = log_mel(noise(SETTINGS.sample_rate), SETTINGS)
    assert features.dtype == np.float32
    assert features.shape == (98, 80)


def test_log_mel_of_a_frame_is_independent_of_its_neighbours() -> None:
    waveform = speech()
    whole = log_mel(waveform, SETTINGS)
    n_alone = 0
    for frame in range(0, len(whole), 37):
        start = frame * SETTINGS.hop_samples
        alone = log_mel(waveform[start : start + SETTINGS.window_samples], SETTINGS)
        np.testing.assert_array_equal(alone, whole[frame : frame + 1])
        n_alone += 1
    assert n_alone > 5


def test_stream_equals_whole_for_random_splits_beyond_one_block() -> None:
    waveform = np.concatenate([speech(), noise(4 * SETTINGS.sample_rate + 17)])
    whole = log_mel(waveform, SETTINGS)
    assert len(whole) > 2 * BLOCK_FRAMES
    for seed, longest in enumerate([97, 700, 3_000, 60_000, 100_000]):
        lengths = random_lengths(len(waveform), longest=longest, seed=seed)
        assert len(lengths) > 2
        np.testing.assert_array_equal(stream_log_mel(waveform, lengths, SETTINGS), whole)


def test_stream_equals_whole_one_sample_at_a_time() -> None:
    waveform = noise(1_777)
    whole = log_mel(waveform, SETTINGS)
    assert len(whole) == 9
    by_sample = stream_log_mel(waveform, [1] * len(waveform), SETTINGS)
    np.testing.assert_array_equal(by_sample, whole)


def test_stream_equals_whole_at_8_khz() -> None:
    settings = FeatureSettings(sample_rate=8_000, n_mels=40)
    waveform = noise(30_011)
    lengths = random_lengths(len(waveform), longest=500, seed=3)
    np.testing.assert_array_equal(
        stream_log_mel(waveform, lengths, settings), log_mel(waveform, settings)
    )


def test_stream_gives_each_frame_as_soon_as_its_window_is_full() -> None:
    stream = FeatureStream(SETTINGS)
    assert stream.push(noise(399)).shape == (0, 80)
    assert stream.push(noise(1)).shape == (1, 80)
    assert stream.push(noise(159)).shape == (0, 80)
    assert stream.push(noise(1)).shape == (1, 80)


def test_stream_keeps_its_samples_when_the_callers_buffer_changes() -> None:
    waveform = noise(2_000)
    stream = FeatureStream(SETTINGS)
    first, second = waveform[:1_000].copy(), waveform[1_000:]
    features = [stream.push(first)]
    first[:] = 1.0
    features.append(stream.push(second))
    np.testing.assert_array_equal(np.concatenate(features), log_mel(waveform, SETTINGS))


@pytest.mark.parametrize("n_samples", [0, 1, 399])
def test_log_mel_has_no_frames_when_shorter_than_a_window(n_samples: int) -> None:
    assert log_mel(noise(n_samples), SETTINGS).shape == (0, 80)
    assert FeatureStream(SETTINGS).push(noise(n_samples)).shape == (0, 80)
    assert count_frames(n_samples, SETTINGS) == 0


@pytest.mark.parametrize(
    ("n_samples", "n_frames"), [(400, 1), (559, 1), (560, 2), (16_000, 98), (41_200, 256)]
)
def test_count_frames_counts_whole_windows(n_samples: int, n_frames: int) -> None:
    assert count_frames(n_samples, SETTINGS) == n_frames


@pytest.mark.parametrize("sample_rate", [8_000, 16_000])
def test_count_frames_agrees_with_log_mel_and_torchaudio(sample_rate: int) -> None:
    settings = FeatureSettings(sample_rate=sample_rate)
    for n_samples in np.random.default_rng(4).integers(400, 9_000, 25).tolist():
        waveform = noise(n_samples)
        n_frames = count_frames(n_samples, settings)
        assert len(log_mel(waveform, settings)) == n_frames
        assert len(torchaudio_log_mel(waveform, settings)) == n_frames


@pytest.mark.parametrize(
    ("sample_rate", "window_samples", "hop_samples"),
    [(8_000, 200, 80), (16_000, 400, 160), (22_050, 551, 220), (48_000, 1_200, 480)],
)
def test_settings_give_samples_of_window_and_hop(
    sample_rate: int, window_samples: int, hop_samples: int
) -> None:
    settings = FeatureSettings(sample_rate=sample_rate)
    assert settings.window_samples == window_samples
    assert settings.hop_samples == hop_samples


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sample_rate", 0),
        ("sample_rate", 7_999),
        ("sample_rate", 48_001),
        ("sample_rate", 16_000.5),
        ("n_mels", 0),
        ("n_mels", 1_000),
        ("window_ms", 0),
        ("window_ms", float("nan")),
        ("hop_ms", 0),
        ("hop_ms", -10),
        ("low_hz", -1),
        ("preemphasis", -0.1),
        ("preemphasis", 1),
        ("sample_rate", "fast"),
        ("dither", 0.0),
    ],
)
def test_settings_reject_nonsense(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        FeatureSettings.model_validate({field: value})
    assert field in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"hop_ms": 0.01},  # rounds to no samples at all
        {"window_ms": 0.05},  # one sample: the window function is undefined
        {"window_ms": float("inf")},
        {"low_hz": 8_000},  # the upper edge is at 8 kHz
        {"hop_ms": 30},  # beyond the window: samples between windows would be lost
    ],
    ids=["hop-of-no-sample", "window-of-one-sample", "endless-window", "low-at-nyquist", "gaps"],
)
def test_settings_reject_what_cannot_be_computed(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        FeatureSettings.model_validate(fields)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        SETTINGS.sample_rate = 8_000  # type: ignore[misc]  # the point of the test
