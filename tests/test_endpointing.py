"""Endpointing on flags and energies made by hand: where speech begins and utterances end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from service.endpointing import Endpointer, EndpointSettings, QuietDetector
from service.errors import RequestError

FRAME_S = 0.04


def _flags(script: str) -> list[bool]:
    """One flag for each character, set where it is a dot."""
    return [character == "." for character in script]


def _endpointer(**settings: Any) -> Endpointer:
    return Endpointer(EndpointSettings(**settings), frame_s=FRAME_S)


def _quiet(levels_db: list[float]) -> list[bool]:
    """What a detector says of frames of these levels: 4 feature frames of 80 equal bands each."""
    detector = QuietDetector(frame_s=FRAME_S)
    bands = [np.log(10 ** (level / 10) / 80) for level in levels_db]
    return [detector.push(np.full((4, 80), band, np.float32)) for band in bands]


# --- quiet frames --------------------------------------------------------------------------------


@pytest.mark.parametrize("floor_db", [-30.0, 20.0, 60.0])
def test_pauses_are_quiet_and_speech_is_not_at_any_gain(floor_db: float) -> None:
    levels = [floor_db] * 20 + [floor_db + 40] * 30 + [floor_db] * 20
    assert _quiet(levels) == [True] * 20 + [False] * 30 + [True] * 20


def test_steady_noise_is_quiet() -> None:
    levels = np.random.default_rng(0).normal(30, 1, 500)
    assert np.mean(_quiet(levels.tolist())) > 0.98


def test_stream_that_begins_with_speech_has_quiet_pauses() -> None:
    quiet = _quiet([60.0] * 30 + [20.0] * 10 + [60.0] * 30 + [20.0] * 10)
    assert all(quiet[30:40] + quiet[70:])
    assert not any(quiet[40:70])


def test_noise_that_sets_in_is_quiet_after_a_while() -> None:
    quiet = _quiet([20.0] * 50 + [50.0] * 700)
    assert not any(quiet[50:60])
    assert all(quiet[-100:])


def test_digital_silence_is_no_floor_for_faint_noise() -> None:
    assert all(_quiet([-120.0] * 50 + [-31.0] * 50))


def test_loudest_feature_frame_decides() -> None:
    detector = QuietDetector(frame_s=FRAME_S)
    frame = np.full((4, 80), -5.0, np.float32)
    assert detector.push(frame)
    frame[2] = 5.0
    assert not detector.push(frame)


# --- beginning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "expected"), [("", None), ("......", None), ("a", 0), ("...a", 3), ("..aa..a.", 2)]
)
def test_speech_begins_at_its_first_frame(script: str, expected: int | None) -> None:
    assert _endpointer().find_start(_flags(script)) == expected


def test_scattered_frames_are_no_speech_where_more_are_needed() -> None:
    endpointer = _endpointer(start_history_ms=320, start_threshold=0.5)
    assert endpointer.find_start(_flags("a...a...a....aa...a..")) is None
    assert endpointer.find_start(_flags("a..........aa.aa....")) == 11
    assert endpointer.find_start(_flags("....aaa")) is None
    assert endpointer.find_start(_flags("....aaaa")) == 4


# --- end -----------------------------------------------------------------------------------------


def test_utterance_ends_after_silence_of_the_whole_window() -> None:
    endpointer = _endpointer(stop_history_ms=400)
    assert endpointer.n_stop == 10
    assert endpointer.has_ended(_flags("aa.........."), _flags("aa.........."))
    assert not endpointer.has_ended(_flags("aaa........."), _flags("aa.........."))
    assert not endpointer.has_ended(_flags("aa.........."), _flags("aa.......a.."))
    assert not endpointer.has_ended(_flags("........."), _flags("........."))


def test_utterance_in_noise_ends_after_blanks_of_twice_the_window() -> None:
    endpointer = _endpointer(stop_history_ms=400)
    assert endpointer.has_ended(_flags("x" * 21), _flags("a" + "." * 20))
    assert not endpointer.has_ended(_flags("x" * 21), _flags("aa" + "." * 19))


def test_only_the_last_frames_count() -> None:
    endpointer = _endpointer(stop_history_ms=400)
    assert not endpointer.has_ended(_flags("." * 40 + "xx"), _flags("." * 12 + "a" * 30))
    assert endpointer.may_end(_flags("xxxx.........."))
    assert not endpointer.may_end(_flags("..........x"))
    assert not endpointer.may_end([])


def test_pause_is_found_in_the_shorter_window() -> None:
    endpointer = _endpointer(stop_history_eou_ms=120)
    assert endpointer.has_paused(_flags("x..."), _flags("a..."))
    assert not endpointer.has_paused(_flags("xx.."), _flags("a..."))
    assert not endpointer.has_paused(_flags("x..."), _flags("aa.."))
    assert not endpointer.has_paused(_flags(".."), _flags(".."))
    assert endpointer.may_pause(_flags("x..."))
    assert not endpointer.may_pause(_flags("xx.."))


def test_pause_is_nothing_where_no_shorter_window_is_set() -> None:
    assert not _endpointer().may_pause(_flags("." * 100))


# --- settings ------------------------------------------------------------------------------------


def test_each_setting_changes_a_decision() -> None:
    speech = _flags("a..a....a...")
    assert _endpointer(start_threshold=0.3).find_start(speech) is None
    assert _endpointer(start_threshold=0.3, start_history_ms=160).find_start(speech) == 0
    assert _endpointer(start_threshold=0.2).find_start(speech) == 0
    silence = _flags("aaaa....a.....")
    assert not _endpointer().has_ended(silence, silence)
    assert _endpointer(stop_history_ms=200).has_ended(silence, silence)
    assert _endpointer(stop_history_ms=400, stop_threshold=0.9).has_ended(silence, silence)
    assert not _endpointer(stop_history_eou_ms=400).has_paused(silence, silence)
    assert _endpointer(stop_history_eou_ms=200).has_paused(silence, silence)
    assert _endpointer(stop_history_eou_ms=400, stop_threshold_eou=0.9).has_paused(silence, silence)
    assert _endpointer().n_longest == 750
    assert _endpointer(longest_utterance_s=2).n_longest == 50


@pytest.mark.parametrize("name", ["start_history_ms", "stop_history_ms", "stop_history_eou_ms"])
def test_windows_out_of_range_are_refused_by_name(name: str) -> None:
    for value in (-1, 0, 39, 10_001):
        field = name.removesuffix("_ms")
        with pytest.raises(RequestError, match=f"^{field} is {value} ms, expected 40 to 10,000 ms"):
            EndpointSettings(**{name: value})
    for value in (40, 10_000):
        assert _endpointer(**{name: value}).n_stop >= 1


@pytest.mark.parametrize("name", ["start_threshold", "stop_threshold", "stop_threshold_eou"])
@pytest.mark.parametrize("value", [-0.5, 0.0, 1.001, float("nan"), float("inf")])
def test_shares_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(RequestError, match=f"^{name} is {value:g}, expected more than 0"):
        EndpointSettings(**{name: value})  # type: ignore[arg-type]  # all three are float


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.999, 30.001, float("nan")])
def test_longest_utterance_out_of_range_is_refused_by_name(value: float) -> None:
    with pytest.raises(RequestError, match=r"^longest_utterance is .* s, expected 1 to 30 s"):
        EndpointSettings(longest_utterance_s=value)
