"""Augmentation: what a mask covers, and what a change of microphone adds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from service.features import FeatureSettings, mel_centres_hz
from training.augment import shift_level, spec_augment, warp_frequencies

_N_MELS = 40
_FILL = torch.arange(_N_MELS) / 10.0 + 1000.0  # above every feature: a masked value is known by it


def _make_features(lengths: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(len(lengths), int(lengths.max()), _N_MELS, generator=generator)


def _augment(
    features: Tensor,
    lengths: Tensor,
    *,
    n_frequency_masks: int = 0,
    frequency_width: int = 0,
    time_masks_per_s: float = 0.0,
    time_width_frames: int = 0,
    time_share: float = 1.0,
    seed: int = 0,
) -> Tensor:
    torch.manual_seed(seed)
    return spec_augment(
        features,
        lengths,
        fill=_FILL,
        n_frequency_masks=n_frequency_masks,
        frequency_width=frequency_width,
        time_masks_per_s=time_masks_per_s,
        time_width_frames=time_width_frames,
        time_share=time_share,
        frames_per_s=100.0,
    )


def _runs(flags: Tensor) -> list[int]:
    """Lengths of the stretches of True."""
    text = "".join("x" if flag else " " for flag in flags.tolist())
    return [len(run) for run in text.split()]


def test_spec_augment_changes_nothing_but_to_the_fill() -> None:
    lengths = torch.tensor([300, 120, 7])
    features = _make_features(lengths)
    before = features.clone()
    augmented = _augment(
        features,
        lengths,
        n_frequency_masks=2,
        frequency_width=10,
        time_masks_per_s=2.0,
        time_width_frames=20,
    )
    masked = augmented != features
    assert torch.equal(features, before)
    assert masked.any()
    assert not masked.all()
    assert torch.equal(augmented[masked], _FILL.expand_as(features)[masked])


def test_spec_augment_without_masks_changes_nothing() -> None:
    lengths = torch.tensor([90, 20])
    features = _make_features(lengths)
    assert torch.equal(_augment(features, lengths), features)
    assert torch.equal(_augment(features, lengths, frequency_width=9), features)
    assert torch.equal(_augment(features, lengths, n_frequency_masks=9), features)
    assert torch.equal(_augment(features, lengths, time_width_frames=9), features)
    assert torch.equal(_augment(features, lengths, time_masks_per_s=9), features)


def test_frequency_masks_are_bounded_in_number_and_width() -> None:
    lengths = torch.tensor([60] * 16)
    features = _make_features(lengths)
    widths = set()
    for seed in range(40):
        masked = _augment(features, lengths, n_frequency_masks=1, frequency_width=6, seed=seed)
        for utterance in masked == _FILL:
            assert torch.equal(utterance.all(dim=0), utterance.any(dim=0))  # whole bands
            runs = _runs(utterance[0])
            assert len(runs) <= 1
            widths.add(sum(runs))
        two = _augment(features, lengths, n_frequency_masks=2, frequency_width=6, seed=seed)
        assert max(len(_runs(utterance[0])) for utterance in two == _FILL) <= 2
        assert max(int(utterance[0].sum()) for utterance in two == _FILL) <= 12
    assert widths == set(range(7))


def test_frequency_masks_reach_every_band() -> None:
    lengths = torch.tensor([3] * 64)
    features = _make_features(lengths)
    hit = torch.zeros(_N_MELS, dtype=torch.bool)
    for seed in range(20):
        masked = _augment(features, lengths, n_frequency_masks=1, frequency_width=3, seed=seed)
        hit |= (masked == _FILL)[:, 0].any(dim=0)
    assert hit.all()


def test_time_masks_are_bounded_in_number_and_width() -> None:
    lengths = torch.tensor([400, 200, 100])  # at 1.5 a second: 6, 3 and 2 masks
    features = _make_features(lengths)
    most = [0, 0, 0]
    for seed in range(60):
        masked = _augment(features, lengths, time_masks_per_s=1.5, time_width_frames=9, seed=seed)
        for i, utterance in enumerate(masked == _FILL):
            assert torch.equal(utterance.all(dim=1), utterance.any(dim=1))  # whole frames
            runs = _runs(utterance[:, 0])
            assert sum(runs) <= (6, 3, 2)[i] * 9
            most[i] = max(most[i], len(runs))
    assert most == [6, 3, 2]


def test_time_mask_covers_at_most_its_share() -> None:
    lengths = torch.tensor([200, 50, 9])
    features = _make_features(lengths)
    widest = [0, 0, 0]
    for seed in range(200):
        masked = _augment(
            features,
            lengths,
            time_masks_per_s=0.01,  # rounds to none: the least is one
            time_width_frames=15,
            time_share=0.1,
            seed=seed,
        )
        for i, utterance in enumerate(masked == _FILL):
            widest[i] = max(widest[i], int(utterance[:, 0].sum()))
    assert widest == [15, 5, 0]  # the width, the share, and a share below one frame


def test_time_masks_stay_inside_each_utterance() -> None:
    lengths = torch.tensor([150, 40, 11])
    features = _make_features(lengths)
    hit = torch.zeros(features.shape[:2], dtype=torch.bool)
    for seed in range(150):
        masked = _augment(features, lengths, time_masks_per_s=4.0, time_width_frames=8, seed=seed)
        hit |= (masked == _FILL).any(dim=2)
    inside = torch.arange(150) < lengths[:, None]
    assert torch.equal(hit, inside)  # every frame can be hit, and no padding


def test_spec_augment_draws_each_utterance_its_own_masks() -> None:
    lengths = torch.tensor([200] * 8)
    features = _make_features(lengths[:1]).expand(8, -1, -1)
    masked = _augment(
        features,
        lengths,
        n_frequency_masks=1,
        frequency_width=20,
        time_masks_per_s=1.0,
        time_width_frames=50,
    )
    assert len({utterance.numpy().tobytes() for utterance in masked}) == 8


def test_spec_augment_repeats_with_the_seed() -> None:
    lengths = torch.tensor([200, 80])
    features = _make_features(lengths)

    def masked(seed: int) -> Tensor:
        return _augment(
            features,
            lengths,
            n_frequency_masks=2,
            frequency_width=12,
            time_masks_per_s=1.0,
            time_width_frames=30,
            seed=seed,
        )

    assert torch.equal(masked(1), masked(1))
    assert not torch.equal(masked(1), masked(2))


def test_shift_level_adds_one_level_an_utterance() -> None:
    features = _make_features(torch.tensor([50] * 6))
    torch.manual_seed(0)
    added = shift_level(features, level_db=5.0, tilt_db=0.0) - features
    torch.testing.assert_close(added, added[:, :1, :1].expand_as(added), atol=1e-5, rtol=0)
    assert len(added[:, 0, 0].unique()) == 6


def test_shift_level_tilts_linearly_over_the_bands() -> None:
    features = _make_features(torch.tensor([50] * 6))
    torch.manual_seed(0)
    added = shift_level(features, level_db=0.0, tilt_db=5.0) - features
    torch.testing.assert_close(added, added[:, :1].expand_as(added), atol=1e-5, rtol=0)
    steps = added[:, 0].diff(dim=1)
    torch.testing.assert_close(steps, steps[:, :1].expand_as(steps), atol=1e-4, rtol=0)
    torch.testing.assert_close(added[:, 0, 0], -added[:, 0, -1], atol=1e-5, rtol=0)
    assert len(steps[:, 0].unique()) > 1


@pytest.mark.parametrize(("level_db", "tilt_db"), [(4.0, 0.0), (0.0, 4.0)])
def test_shift_level_has_the_deviation_it_is_given(level_db: float, tilt_db: float) -> None:
    torch.manual_seed(0)
    added = shift_level(torch.zeros(20_000, 1, _N_MELS), level_db=level_db, tilt_db=tilt_db)[:, 0]
    db = added * 10 / math.log(10)
    assert float(db[:, 0].mean()) == pytest.approx(0.0, abs=0.1)
    if level_db:
        assert float(db[:, 0].std()) == pytest.approx(4.0, rel=0.03)
    else:
        assert float((db[:, -1] - db[:, 0]).std()) == pytest.approx(4.0, rel=0.03)


def test_shift_level_of_zero_changes_nothing() -> None:
    features = _make_features(torch.tensor([50, 30]))
    assert torch.equal(shift_level(features, level_db=0.0, tilt_db=0.0), features)


def test_shift_level_repeats_with_the_seed() -> None:
    features = _make_features(torch.tensor([50, 30]))

    def shifted(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return shift_level(features, level_db=3.0, tilt_db=3.0)

    assert torch.equal(shifted(1), shifted(1))
    assert not torch.equal(shifted(1), shifted(2))


def test_warp_stretches_the_frequencies_of_each_utterance() -> None:
    centres_hz = torch.from_numpy(mel_centres_hz(FeatureSettings())).float()
    torch.manual_seed(3)
    features = centres_hz.expand(500, 4, -1)  # each band says its frequency
    warped = warp_frequencies(features, centres_hz, warp=0.2)
    factors = (warped / centres_hz)[:, :, 5:-10]  # the ends have no neighbours to read
    assert torch.allclose(factors, factors[:, :1, :1].expand_as(factors), rtol=1e-4)
    factor = factors[:, 0, 0]
    assert 0.8 <= factor.min() < 0.81
    assert 1.19 < factor.max() <= 1.2
    assert factor.mean() == pytest.approx(1.0, abs=0.02)
    assert warped.max() <= centres_hz.max()
    assert warped.min() >= centres_hz.min()


def test_warp_of_nothing_changes_nothing() -> None:
    centres_hz = torch.from_numpy(mel_centres_hz(FeatureSettings())).float()
    features = torch.randn(3, 7, len(centres_hz))
    torch.testing.assert_close(warp_frequencies(features, centres_hz, warp=0.0), features)
