"""Noise, rooms and telephones on features: levels, where energy goes, what is left alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from service.features import FeatureSettings, log_mel, mel_centres_hz
from training.noise import FLOOR, add_noise, narrow, reverberate

_N_MELS = 20
_LENGTHS = torch.tensor([200, 150, 180, 120])


def _draw_features(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(_LENGTHS), 200, _N_MELS, generator=generator) * 2 - 6


def _inside() -> Iterator[tuple[int, int]]:
    return enumerate(_LENGTHS.tolist())


def _noisy(features: Tensor, *, share: float, low: float, high: float, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return add_noise(
        features,
        _LENGTHS,
        share=share,
        lowest_snr_db=low,
        highest_snr_db=high,
        most_voices=3,
    )


@pytest.mark.parametrize("snr_db", [0.0, 10.0, 25.0])
def test_noise_has_the_ratio_that_is_asked_for(snr_db: float) -> None:
    features = _draw_features()
    noisy = _noisy(features, share=1.0, low=snr_db, high=snr_db)
    for clean_row, noisy_row, length in zip(features, noisy, _LENGTHS.tolist(), strict=True):
        clean = clean_row[:length].exp().mean()
        noise = noisy_row[:length].exp().mean() - clean
        assert 10 * torch.log10(clean / noise).item() == pytest.approx(snr_db, abs=0.1)


def test_noise_reaches_the_share_of_the_utterances() -> None:
    features = _draw_features()
    changed = 0
    for seed in range(100):
        noisy = _noisy(features, share=0.3, low=5, high=5, seed=seed)
        changed += sum(float((noisy[i, :n] - features[i, :n]).max()) > 1e-3 for i, n in _inside())
    assert changed == pytest.approx(0.3 * 400, abs=40)


def test_noise_only_adds() -> None:
    features = _draw_features()
    noisy = _noisy(features, share=1.0, low=0, high=10)
    assert all((noisy[i, :n] >= features[i, :n] - 1e-4).all() for i, n in _inside())


def test_noise_depends_on_the_seed() -> None:
    features = _draw_features()
    first = _noisy(features, share=1.0, low=0, high=10, seed=4)
    assert torch.equal(first, _noisy(features, share=1.0, low=0, high=10, seed=4))
    assert not torch.equal(first, _noisy(features, share=1.0, low=0, high=10, seed=5))


def test_noise_on_silence_stays_finite() -> None:
    silence = torch.full((2, 30, _N_MELS), FLOOR)
    noisy = add_noise(
        silence,
        torch.tensor([30, 1]),
        share=1.0,
        lowest_snr_db=0,
        highest_snr_db=0,
        most_voices=2,
    )
    assert noisy.isfinite().all()


def test_added_features_are_close_to_those_of_added_waveforms() -> None:
    draw = np.random.default_rng(0)
    settings = FeatureSettings()
    a, b = (draw.normal(size=32_000).astype(np.float32) * g for g in (0.1, 0.05))
    features = [torch.from_numpy(log_mel(w, settings)) for w in (a, b, a + b)]
    added = (features[0].exp() + features[1].exp()).log()
    assert float((added - features[2]).mean().abs()) < 0.3  # no more than where they interfere


def test_room_prolongs_what_stops() -> None:
    features = torch.full((1, 100, _N_MELS), FLOOR)
    features[:, 10:20] = 0.0
    torch.manual_seed(0)
    wet = reverberate(features, share=1.0, longest_s=0.5, frames_per_s=100)
    assert (wet[:, :10] < FLOOR + 0.7).all()  # at most as much again
    assert (wet[:, 10:20] >= 0.0).all()
    tail = wet[0, 20:40, 0]
    assert (tail.diff() < 0).all()
    assert tail[0] > FLOOR + 5


def test_room_leaves_the_others_alone() -> None:
    features = _draw_features()
    assert reverberate(features, share=0.0, longest_s=0.5, frames_per_s=100) is features
    torch.manual_seed(1)
    wet = reverberate(features, share=0.5, longest_s=0.5, frames_per_s=100)
    changed = [not torch.equal(a, b) for a, b in zip(wet, features, strict=True)]
    assert 0 < sum(changed) < len(changed)


def test_telephone_silences_the_bands_outside() -> None:
    features = _draw_features()
    torch.manual_seed(0)
    heard = narrow(features, share=1.0, n_bands_kept=15, n_bands_cut=3)
    assert (heard[:, :, 15:] == FLOOR).all()
    assert torch.equal(heard[:, :, 3:15], features[:, :, 3:15])
    cut = (heard[:, :, :3] == FLOOR).flatten(1)
    assert (cut.all(1) | ~cut.any(1)).all()
    assert torch.equal(narrow(features, share=0.0, n_bands_kept=1, n_bands_cut=1), features)


def test_centres_of_the_bands_rise_to_half_the_rate() -> None:
    centres_hz = mel_centres_hz(FeatureSettings())
    assert (np.diff(centres_hz) > 0).all()
    assert 20 < centres_hz[0] < 60
    assert 7_500 < centres_hz[-1] < 8_000
    tone = np.sin(2 * np.pi * 1_000 * np.arange(16_000) / 16_000).astype(np.float32)
    loudest = log_mel(tone, FeatureSettings()).mean(0).argmax()
    assert abs(centres_hz[loudest] - 1_000) < 40
