"""The first pass: what a stream settles does not depend on how its features arrive."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import N_MELS, make_model

from export.bundle import make_profiles
from export.graph import export_streaming_graph
from service.bundle import Profile
from service.engine import OnnxStreamingEngine
from service.first_pass import FirstPass, FloatArray, Mute
from service.text import CHARACTERS
from training.lexicon import PHONES
from training.model import AcousticModel, Chunking

N_UNITS = len(CHARACTERS) + len(PHONES)

_PROFILES = ((1, 1), (3, 2), (5, 1), (2, 7))
"""Chunk and right context, output frames."""


def _leave(log_probs: FloatArray, features: FloatArray) -> None:
    """Mute nothing."""


@dataclass(frozen=True)
class _Recogniser:
    """A model and its streaming graph."""

    model: AcousticModel
    engine: OnnxStreamingEngine

    @property
    def subsampling(self) -> int:
        return self.model.convolutions.subsampling

    def profile(self, n_chunk: int, n_right: int) -> Profile:
        return Profile(
            chunk_frames=n_chunk,
            right_frames=n_right,
            window_feature_frames=self.model.window_frames(Chunking(n_chunk, n_right)),
        )

    def start(self, profile: Profile, mute: Mute = _leave) -> FirstPass:
        return FirstPass(
            self.engine,
            profile,
            n_mels=N_MELS,
            n_units=N_UNITS,
            subsampling=self.subsampling,
            spell=True,
            mute=mute,
        )


@pytest.fixture(
    scope="module",
    params=[(True, 2), (True, 3), (True, 4), (False, 2)],
    ids=lambda p: f"{'bidirectional' if p[0] else 'forward'}-{p[1]}",
)
def recogniser(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> _Recogniser:
    bidirectional, subsampling = request.param
    model = make_model(bidirectional=bidirectional, subsampling=subsampling)
    path: Path = tmp_path_factory.mktemp("graph") / "streaming.onnx"
    export_streaming_graph(model, path)
    return _Recogniser(model, OnnxStreamingEngine(path))


def _draw_features(n_frames: int) -> FloatArray:
    generator = np.random.default_rng(n_frames)
    return generator.normal(-8.0, 4.0, size=(n_frames, N_MELS)).astype(np.float32)


def _draw_pieces(n_frames: int, seed: int) -> list[int]:
    """Lengths of pieces that make up `n_frames`; seed 0 makes every piece one frame long."""
    longest = [1, 4, 30, n_frames][seed % 4]
    generator = np.random.default_rng(seed)
    pieces: list[int] = []
    while sum(pieces) < n_frames:
        piece = int(generator.integers(0 if longest > 1 else 1, longest + 1))
        pieces.append(min(piece, n_frames - sum(pieces)))
    return pieces


def _push_all(
    first_pass: FirstPass, features: FloatArray, pieces: Iterable[int], *, look_ahead: bool = False
) -> FloatArray:
    """Push pieces of the features, finish, and return all that was settled, (frames, token)."""
    settled, first = [], 0
    for n_frames in pieces:
        settled.append(first_pass.push(features[first : first + n_frames]))
        first += n_frames
        if look_ahead:
            first_pass.look_ahead()
    assert first == len(features)
    settled.append(first_pass.finish())
    return np.concatenate(settled)


@pytest.mark.parametrize("n_frames", [1, 2, 7, 57, 101])
@pytest.mark.parametrize("chunking", _PROFILES)
def test_settled_log_probs_are_those_of_the_model(
    recogniser: _Recogniser, chunking: tuple[int, int], n_frames: int
) -> None:
    features = _draw_features(n_frames)
    actual = _push_all(recogniser.start(recogniser.profile(*chunking)), features, [n_frames])
    with torch.no_grad():
        *heads, _ = recogniser.model(
            torch.from_numpy(features)[None], torch.tensor([n_frames]), Chunking(*chunking)
        )
    assert actual.dtype == np.float32
    expected = torch.cat([head[0].log_softmax(-1) for head in heads], -1)
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("chunking", _PROFILES)
def test_settled_log_probs_do_not_depend_on_the_pieces(
    recogniser: _Recogniser, chunking: tuple[int, int], seed: int
) -> None:
    profile = recogniser.profile(*chunking)
    features = _draw_features(60 + seed)
    expected = _push_all(recogniser.start(profile), features, [len(features)])
    pieces = _draw_pieces(len(features), seed)
    actual = _push_all(recogniser.start(profile), features, pieces)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("chunking", _PROFILES)
def test_looking_ahead_does_not_change_what_is_settled(
    recogniser: _Recogniser, chunking: tuple[int, int]
) -> None:
    profile = recogniser.profile(*chunking)
    features = _draw_features(50)
    expected = _push_all(recogniser.start(profile), features, [50])
    for seed in range(3):
        pieces = _draw_pieces(50, seed)
        actual = _push_all(recogniser.start(profile), features, pieces, look_ahead=True)
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("chunking", _PROFILES)
def test_settled_frames_of_every_length_are_complete(
    recogniser: _Recogniser, chunking: tuple[int, int]
) -> None:
    profile = recogniser.profile(*chunking)
    for n_frames in range(35):
        settled = _push_all(recogniser.start(profile), _draw_features(n_frames), [n_frames])
        assert settled.shape == (-(-n_frames // recogniser.subsampling), N_UNITS)


def test_chunk_is_settled_as_soon_as_its_window_is_full(recogniser: _Recogniser) -> None:
    profile = recogniser.profile(3, 2)
    n_window, n_step = profile.window_feature_frames, 3 * recogniser.subsampling
    first_pass = recogniser.start(profile)
    for n_pushed, row in enumerate(_draw_features(n_window + 2 * n_step), start=1):
        settled = first_pass.push(row[None])
        is_full = n_pushed >= n_window and (n_pushed - n_window) % n_step == 0
        assert len(settled) == (3 if is_full else 0)


def test_tentative_frames_are_those_to_the_right_of_the_chunk(recogniser: _Recogniser) -> None:
    profile = recogniser.profile(3, 2)
    first_pass = recogniser.start(profile)
    assert first_pass.tentative.shape == (0, N_UNITS)
    first_pass.push(_draw_features(profile.window_feature_frames))
    n_right = 2 if recogniser.model.bidirectional else 0
    assert first_pass.tentative.shape == (n_right, N_UNITS)


def test_looking_ahead_reaches_the_last_frame_as_if_audio_ended_there(
    recogniser: _Recogniser,
) -> None:
    profile = recogniser.profile(3, 2)
    for n_frames in range(1, 40):
        features = _draw_features(n_frames)
        first_pass = recogniser.start(profile)
        n_settled = len(first_pass.push(features))
        first_pass.look_ahead()
        tentative = first_pass.tentative.copy()
        n_left = -(-n_frames // recogniser.subsampling) - n_settled
        n_window = 3 + (2 if recogniser.model.bidirectional else 0)
        assert len(tentative) == min(n_left, n_window)
        rest = first_pass.finish()
        assert len(rest) == n_left
        np.testing.assert_array_equal(tentative[:3], rest[:3])
        assert len(first_pass.tentative) == 0


def test_nothing_pushed_settles_nothing(recogniser: _Recogniser) -> None:
    first_pass = recogniser.start(recogniser.profile(3, 2))
    first_pass.look_ahead()
    assert first_pass.push(_draw_features(0)).shape == (0, N_UNITS)
    assert first_pass.tentative.shape == (0, N_UNITS)
    assert first_pass.finish().shape == (0, N_UNITS)
    assert first_pass.finish().shape == (0, N_UNITS)


def test_streams_share_an_engine_but_nothing_else(recogniser: _Recogniser) -> None:
    profile = recogniser.profile(3, 2)
    features = [_draw_features(n) for n in (60, 61)]
    expected = [_push_all(recogniser.start(profile), f, [len(f)]) for f in features]
    streams = [recogniser.start(profile) for _ in features]
    settled: list[list[FloatArray]] = [[], []]
    for first in range(0, 61, 7):
        for chunks, stream, f in zip(settled, streams, features, strict=True):
            chunks.append(stream.push(f[first : first + 7]))
    for chunks, stream, e in zip(settled, streams, expected, strict=True):
        np.testing.assert_array_equal(np.concatenate([*chunks, stream.finish()]), e)


def test_pushed_features_may_be_overwritten(recogniser: _Recogniser) -> None:
    profile = recogniser.profile(3, 2)
    features = _draw_features(60)
    expected = _push_all(recogniser.start(profile), features, [60])
    first_pass, buffer, settled = recogniser.start(profile), np.empty((5, N_MELS), np.float32), []
    for first in range(0, 60, 5):
        buffer[:] = features[first : first + 5]
        settled.append(first_pass.push(buffer))
        buffer[:] = np.nan
    np.testing.assert_array_equal(np.concatenate([*settled, first_pass.finish()]), expected)


def test_log_probs_are_muted_by_the_features_of_their_window(recogniser: _Recogniser) -> None:
    profile = recogniser.profile(3, 2)
    features = _draw_features(50)
    windows: list[FloatArray] = []

    def mute_by_first_feature(log_probs: FloatArray, window: FloatArray) -> None:
        windows.append(window.copy())
        log_probs[:] = window[:: recogniser.subsampling][: len(log_probs), :1]

    for pieces in ([50], [1] * 50):
        windows.clear()
        settled = _push_all(recogniser.start(profile, mute_by_first_feature), features, pieces)
        np.testing.assert_array_equal(settled[:, 0], features[:: recogniser.subsampling, 0])
        for i, window in enumerate(windows):
            first = i * profile.chunk_frames * recogniser.subsampling
            expected = features[first : first + profile.window_feature_frames]
            np.testing.assert_array_equal(window, expected)


def test_profiles_of_a_bundle_fit_its_model(recogniser: _Recogniser) -> None:
    features = _draw_features(150)
    for profile in make_profiles(recogniser.model).values():
        settled = _push_all(recogniser.start(profile), features, [150])
        chunking = Chunking(profile.chunk_frames, max(1, profile.right_frames))
        with torch.no_grad():
            *heads, _ = recogniser.model(
                torch.from_numpy(features)[None], torch.tensor([150]), chunking
            )
        expected = torch.cat([head[0].log_softmax(-1) for head in heads], -1)
        np.testing.assert_allclose(settled, expected, atol=1e-4, rtol=0)
