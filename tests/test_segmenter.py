"""Cutting a stream into utterances, on scripts: an engine that reads tokens off the features."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from service.bundle import Profile
from service.endpointing import EndpointSettings
from service.engine import StreamState
from service.first_pass import FirstPass
from service.segmenter import (
    PRE_ROLL_S,
    Event,
    Segmenter,
    Settled,
    SpeechBegan,
    Utterance,
    UtteranceEnded,
)

FloatArray = npt.NDArray[np.float32]

FRAME_S = 0.04
SUBSAMPLING = 4
SPACE_TOKEN = 1
PROFILE = Profile(chunk_frames=8, right_frames=4, window_feature_frames=12 * SUBSAMPLING)
N_PRE_ROLL = round(PRE_ROLL_S / FRAME_S)
SYMBOLS = "~ abcdefghijklmnopqrstuvwxyz"
"""Tokens by number, the blank first."""

# A script has one character for each output frame: a dot is quiet and blank, a tilde loud and
# blank, a small letter loud speech, a capital one speech that is quiet.


class ScriptEngine:
    """Reads the token of each output frame off the first band of its features."""

    def initial_state(self, batch_size: int = 1) -> StreamState:
        nothing = np.zeros((batch_size, 0), np.float32)
        return StreamState(nothing, nothing, nothing, nothing)

    def step(
        self,
        features: FloatArray,
        feature_lengths: npt.NDArray[np.int64],
        *,
        n_chunk_frames: int,
        state: StreamState,
        spell: bool = True,
    ) -> tuple[FloatArray, npt.NDArray[np.int64], StreamState]:
        del n_chunk_frames, spell
        tokens = np.round(-features[0, ::SUBSAMPLING, 0] - 100).astype(int)
        log_probs = np.where(np.arange(len(SYMBOLS)) == tokens[:, None], 0.0, -20.0)
        n_frames = -(-feature_lengths // SUBSAMPLING)
        return log_probs[None].astype(np.float32), n_frames, state


def _features(script: str) -> FloatArray:
    """Features whose first band says the token and whose second one how loud it is."""
    rows = []
    for character in script:
        token = max(0, SYMBOLS.find(character.lower()))
        loudness = -3.0 if character == "." or character.isupper() else 3.0
        rows += [(-100.0 - token, loudness)] * SUBSAMPLING
    return np.array(rows, np.float32).reshape(-1, 2)


def _segmenter(**settings: Any) -> Segmenter:
    first_pass = FirstPass(
        ScriptEngine(),
        PROFILE,
        n_mels=2,
        n_units=len(SYMBOLS),
        subsampling=SUBSAMPLING,
        spell=True,
        mute=lambda _log_probs, _features: None,
    )
    return Segmenter(
        first_pass,
        EndpointSettings(**settings),
        subsampling=SUBSAMPLING,
        frame_s=FRAME_S,
        columns=slice(None),
        space=SPACE_TOKEN,
    )


def _push(segmenter: Segmenter, script: str) -> list[Event]:
    return list(segmenter.push(_features(script)))


def _ended(events: Iterable[Event]) -> list[Utterance]:
    return [event.utterance for event in events if isinstance(event, UtteranceEnded)]


def _rest(segmenter: Segmenter) -> Utterance:
    """What is left at the end of the audio."""
    (utterance,) = _ended(segmenter.finish())
    return utterance


def _begun(events: Iterable[Event]) -> list[int]:
    return [event.frame for event in events if isinstance(event, SpeechBegan)]


def _cut(script: str, **settings: Any) -> list[Utterance]:
    """All utterances of a script that hold speech."""
    segmenter = _segmenter(**settings)
    utterances = [*_ended(_push(segmenter, script)), _rest(segmenter)]
    return [utterance for utterance in utterances if utterance.has_speech]


def _range(utterance: Utterance) -> range:
    """Output frames of the stream that an utterance holds."""
    return range(utterance.first_frame, utterance.first_frame + len(utterance.log_probs))


def _check_contents(utterance: Utterance, script: str) -> None:
    """Features and log_probs must be those of the utterance's own frames."""
    frames = _range(utterance)
    features = _features(script)[frames.start * SUBSAMPLING :][: len(utterance.features)]
    assert np.array_equal(utterance.features, features)
    assert -(-len(utterance.features) // SUBSAMPLING) == len(frames)
    read = "".join(SYMBOLS[token] for token in utterance.log_probs.argmax(axis=1))
    assert read == script[frames.start : frames.stop].lower().replace(".", "~")


def _check_cover(utterances: list[Utterance], script: str) -> None:
    """Every speech frame must be in exactly one utterance."""
    times = np.zeros(len(script), int)
    for utterance in utterances:
        _check_contents(utterance, script)
        times[_range(utterance).start : _range(utterance).stop] += 1
    is_speech = np.array([character.isalpha() for character in script])
    assert (times[is_speech] == 1).all()


def _same(a: Event, b: Event) -> bool:
    if isinstance(a, UtteranceEnded) and isinstance(b, UtteranceEnded):
        return (
            _range(a.utterance) == _range(b.utterance)
            and np.array_equal(a.utterance.features, b.utterance.features)
            and np.array_equal(a.utterance.log_probs, b.utterance.log_probs)
        )
    return a == b


# --- one utterance -------------------------------------------------------------------------------


def test_utterance_begins_before_its_speech_and_ends_in_the_silence_behind_it() -> None:
    script = "." * 40 + "hello  world" + "." * 40
    segmenter = _segmenter()
    events = _push(segmenter, script)
    assert _begun(events) == [40]
    (utterance,) = _ended(events)
    assert _range(utterance).start == 40 - N_PRE_ROLL
    assert 52 < _range(utterance).stop < 52 + 14
    _check_contents(utterance, script)
    assert utterance.has_speech
    assert not _rest(segmenter).has_speech


def test_utterance_at_the_start_of_the_stream_has_less_before_it() -> None:
    script = "...hello" + "." * 40
    (utterance,) = _cut(script)
    assert utterance.first_frame == 0
    _check_contents(utterance, script)


@pytest.mark.parametrize("n_extra", [0, 1, 3])
def test_finish_gives_the_rest_to_the_last_feature_frame(n_extra: int) -> None:
    script = "....hello"
    features = np.concatenate([_features(script), _features("o")[:n_extra]])
    segmenter = _segmenter()
    assert not _ended(segmenter.push(features))
    rest = _rest(segmenter)
    assert rest.has_speech
    assert np.array_equal(rest.features, features)
    assert len(rest.log_probs) == len(script) + (n_extra > 0)


def test_finish_without_features_gives_nothing() -> None:
    rest = _rest(_segmenter())
    assert (len(rest.features), rest.log_probs.shape, rest.has_speech) == (
        0,
        (0, len(SYMBOLS)),
        False,
    )


def test_spaces_are_no_speech() -> None:
    assert _cut("." * 20 + " " * 20 + "." * 20) == []


def test_utterance_goes_on_in_short_pauses_quiet_speech_and_loud_blanks() -> None:
    script = "." * 20 + "one....two~~~~three....four~~~~~~~~~five" + "." * 30
    (utterance,) = _cut(script)
    _check_contents(utterance, script)
    quiet = "." * 20 + "one" + "TWO" * 10 + "." * 30
    (utterance,) = _cut(quiet)
    assert _range(utterance).stop > 53


def test_utterance_in_noise_ends_after_blanks_for_twice_as_long() -> None:
    n_stop = 14
    script = "." * 10 + "~" * 20 + "one" + "~" * 60
    segmenter = _segmenter()
    (utterance,) = _ended(_push(segmenter, script))
    assert _begun(_push(_segmenter(), script)) == [30]
    assert 33 + n_stop < _range(utterance).stop < 33 + 3 * n_stop
    (both,) = _cut("." * 10 + "~" * 20 + "one" + "~" * 15 + "two" + "~" * 10)
    assert {33 + 15, 33 + 17} <= set(_range(both))


# --- several utterances --------------------------------------------------------------------------


@pytest.mark.parametrize("n_between", [14, 15, 20, 40, 300])
def test_utterances_hold_every_speech_frame_once(n_between: int) -> None:
    script = "." * 25 + ("." * n_between).join(["one two", "three", "f", "five six"]) + "." * 40
    utterances = _cut(script)
    assert len(utterances) == 4
    _check_cover(utterances, script)


@pytest.mark.parametrize("stop_history_ms", [40, 80, 160, 280, 400])
def test_utterances_do_not_overlap_in_speech_when_short_silences_end_them(
    stop_history_ms: int,
) -> None:
    script = "." * 25 + "one" + "." * 8 + "two" + "." * 11 + "three" + "." * 20 + "four" + "." * 30
    _check_cover(_cut(script, stop_history_ms=stop_history_ms), script)


def test_utterances_do_not_overlap_in_speech_when_a_part_of_silence_ends_them() -> None:
    script = "." * 25 + "one" + "." * 8 + "two" + "." * 11 + "three" + "." * 20 + "four" + "." * 30
    _check_cover(_cut(script, stop_threshold=0.5), script)


def test_events_are_the_same_however_the_features_are_cut() -> None:
    script = "." * 50 + "one....two" + "." * 30 + "three" + "~" * 40 + "abc def " * 10 + "." * 30
    features = _features(script)
    settings = {"stop_history_eou_ms": 120, "longest_utterance_s": 2.0}
    whole = _segmenter(**settings)
    expected = list(whole.push(features))
    assert len(_ended(expected)) >= 3
    rest = list(whole.finish())
    rng = np.random.default_rng(0)
    for largest in (1, 3, 9, 200):
        segmenter = _segmenter(**settings)
        places = np.cumsum(rng.integers(0, largest + 1, 2 * len(features)))
        pieces = np.split(features, places[places < len(features)])
        events = [event for piece in pieces for event in segmenter.push(piece)]
        assert len(events) == len(expected)
        assert all(_same(a, b) for a, b in zip(events, expected, strict=True))
        assert all(map(_same, segmenter.finish(), rest))


def test_silence_takes_no_more_memory_than_the_next_utterance_may_need() -> None:
    segmenter = _segmenter()
    longest = 0
    for _ in range(500):
        assert _push(segmenter, "." * 10) == []
        longest = max(longest, len(segmenter._features), len(segmenter._settled))
    assert longest <= N_PRE_ROLL + 8 + 12
    script = "." * 10 + "one" + "." * 30
    (utterance,) = _ended(_push(segmenter, script))
    assert utterance.first_frame == 5_000 + 10 - N_PRE_ROLL


# --- long utterances -----------------------------------------------------------------------------


def test_long_utterance_is_cut_in_the_longest_pause_of_its_second_half() -> None:
    script = "a" * 10 + "." * 8 + "b" * 14 + "." * 3 + "c" * 3 + "." * 6 + "d" * 20 + "." * 30
    utterances = _cut(script, longest_utterance_s=2.0)
    assert len(utterances) == 2
    assert 38 < _range(utterances[0]).stop < 44
    assert utterances[1].first_frame == _range(utterances[0]).stop
    _check_cover(utterances, script)


@pytest.mark.parametrize("longest_s", [1.0, 2.2, 7.0])
def test_endless_speech_is_cut_and_nothing_is_lost(longest_s: float) -> None:
    rng = np.random.default_rng(3)
    for script in ("".join(rng.choice(list("ab~ "), 700)), "a" * 700, "ab " * 233 + "."):
        utterances = _cut(script, longest_utterance_s=longest_s)
        assert all(len(_range(u)) <= longest_s / FRAME_S for u in utterances)
        _check_cover(utterances, script)


def test_speech_behind_a_cut_is_told_to_begin_again() -> None:
    script = "a" * 120
    segmenter = _segmenter(longest_utterance_s=2.0)
    events = _push(segmenter, script)
    ends = [_range(utterance).stop for utterance in _ended(events)]
    assert _begun(events) == [0, *ends]


def test_memory_is_bounded_in_endless_speech() -> None:
    segmenter = _segmenter(longest_utterance_s=2.0)
    for _ in range(100):
        _push(segmenter, "abc~~d ")
        assert len(segmenter._features) <= 50


# --- pauses and the sender's wish ----------------------------------------------------------------


def test_pause_is_told_once_where_the_shorter_window_is_set() -> None:
    script = "." * 20 + "one two ok" + "." * 6 + "two" + "." * 6 + "three" + "." * 30
    without = _push(_segmenter(), script)
    assert Settled(is_pause=True) not in without
    segmenter = _segmenter(stop_history_eou_ms=160)
    known: list[int] = []
    for frame, character in enumerate(script):
        n_pauses = _push(segmenter, character).count(Settled(is_pause=True))
        known += [frame] * n_pauses
    assert known == [30 + 3, 39 + 3, 50 + 3]
    assert len(_ended(without)) == 1


def test_end_utterance_ends_it_with_the_last_whole_frame() -> None:
    script = "." * 20 + "one two three" + "." * 40
    segmenter = _segmenter()
    _push(segmenter, script[:28])
    (first,) = _ended(segmenter.end_utterance())
    assert _range(first) == range(20 - N_PRE_ROLL, 28)
    (second,) = _ended(_push(segmenter, script[28:]))
    assert second.first_frame == 28
    _check_cover([first, second], script)


def test_end_utterance_is_nothing_where_nobody_has_spoken() -> None:
    segmenter = _segmenter()
    assert list(segmenter.end_utterance()) == []
    _push(segmenter, "." * 30)
    assert list(segmenter.end_utterance()) == []
    script = "." * 30 + "one" + "." * 40
    (utterance,) = _ended(_push(segmenter, script[30:]))
    _check_contents(utterance, script)
    assert list(segmenter.end_utterance()) == []


def test_end_utterance_hears_speech_that_no_window_has_settled() -> None:
    segmenter = _segmenter()
    assert _push(segmenter, "..one") == []
    began, ended = segmenter.end_utterance()
    assert began == SpeechBegan(2)
    (utterance,) = _ended([ended])
    _check_contents(utterance, "..one")
