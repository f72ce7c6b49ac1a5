"""Sessions on real speech: what a stream is told depends on its audio alone."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Sequence
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import join_with_pauses, noise

from service import audio
from service.audio import AudioFormat, Encoding, to_pcm
from service.bundle import Survival
from service.endpointing import EndpointSettings
from service.errors import AudioError, RequestError
from service.features import log_mel
from service.recogniser import DecoderName, FloatArray, Recogniser, Segment, TimedWord
from service.request import StreamRequest
from service.segmenter import PRE_ROLL_S, UtteranceEnded
from service.session import OFFLINE_PROFILE, Session, SpeechEvent, Update

PCM = AudioFormat(Encoding.LINEAR16)
WAYS: list[dict[str, Any]] = [
    {"profile": "fast", "second_pass": True},
    {"profile": "fast", "second_pass": False},
    {"profile": "balanced", "second_pass": True},
    {"profile": "balanced", "second_pass": False},
    {"profile": OFFLINE_PROFILE},
]


@pytest.fixture(scope="module")
def eager(recogniser: Recogniser) -> Recogniser:
    """The shipped model, but calibrated so that interim words are committed at once."""
    certain = Survival(intercept=8.0, confidence=0.0)
    kinds = ("greedy", "greedy+second-pass", "beam", "beam+second-pass")
    return dataclasses.replace(recogniser, survival=dict.fromkeys(kinds, certain))


@pytest.fixture(scope="module")
def talk(waveforms: list[FloatArray]) -> FloatArray:
    """All example clips, a pause behind each."""
    return join_with_pauses(waveforms)


def _open(recogniser: Recogniser, *, decoder: DecoderName = "greedy", **options: Any) -> Session:
    return Session(recogniser, StreamRequest(audio=PCM, **options), decoder=decoder)


def _push(session: Session, data: bytes, sizes: Iterable[int] = (3200,)) -> list[Update]:
    """Push bytes in pieces of the given sizes, repeated."""
    updates, place = [], 0
    for size in cycle(sizes):
        if place >= len(data):
            break
        updates += session.push(data[place : place + size])
        place += size
    return updates


def _run(
    recogniser: Recogniser, waveform: FloatArray, sizes: Iterable[int] = (3200,), **options: Any
) -> list[Update]:
    session = _open(recogniser, **options)
    return _push(session, to_pcm(waveform), sizes) + list(session.finish())


def _is_final(update: Update) -> bool:
    return bool(update.results) and update.results[0].is_final


def _is_interim(update: Update) -> bool:
    return bool(update.results) and not update.results[0].is_final


def _without_interim(updates: Iterable[Update]) -> list[Update]:
    return [update for update in updates if not _is_interim(update)]


def _finals(updates: Iterable[Update]) -> list[Segment]:
    return [update.results[0].segment for update in updates if _is_final(update)]


def _events(updates: Iterable[Update]) -> list[SpeechEvent]:
    return [update.event for update in updates if update.event is not None]


def _words(segment: Segment) -> tuple[TimedWord, ...]:
    return segment.alternatives[0].words


def _text(segment: Segment) -> str:
    return segment.alternatives[0].transcript


def _committed(update: Update) -> tuple[TimedWord, ...]:
    """Words of an interim update that are committed."""
    return tuple(w for r in update.results if r.stability >= 0.9 for w in _words(r.segment))


# --- any chunking --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("decoder", ["greedy", "beam"])
def test_finals_and_events_are_the_same_for_any_chunking(
    recogniser: Recogniser, waveforms: list[FloatArray], decoder: DecoderName, way: dict[str, Any]
) -> None:
    both = join_with_pauses([waveforms[1][16_000:], waveforms[3]])
    options = {**way, "decoder": decoder, "speech_events": True, "interim_results": True}
    expected = _without_interim(_run(recogniser, both, (1 << 20,), **options))
    assert len(_finals(expected)) == 2
    assert _events(expected) == [SpeechEvent.SPEECH_BEGAN, SpeechEvent.SPEECH_ENDED] * 2
    for sizes in ((3200,), (1, 7_777, 401, 20_001)):
        assert _without_interim(_run(recogniser, both, sizes, **options)) == expected


@pytest.mark.parametrize("second_pass", [True, False])
def test_finals_are_the_same_byte_by_byte_and_behind_a_wav_header(
    recogniser: Recogniser, waveforms: list[FloatArray], second_pass: bool
) -> None:
    pcm = to_pcm(waveforms[1][:20_000])
    file = io.BytesIO()
    soundfile.write(file, np.frombuffer(pcm, "<i2"), 16_000, format="WAV", subtype="PCM_16")
    found = []
    for data, sizes in ((pcm, (len(pcm),)), (pcm, (1,)), (file.getvalue(), (1, 2, 333))):
        session = Session(recogniser, StreamRequest(second_pass=second_pass), decoder="greedy")
        found.append(_finals(_push(session, data, sizes) + list(session.finish())))
    assert found[1:] == [found[0]] * 2
    assert any(_words(segment) for segment in found[0])


@pytest.mark.parametrize("second_pass", [True, False])
@pytest.mark.parametrize("decoder", ["greedy", "beam"])
def test_finals_are_the_same_whether_interim_results_are_wanted_or_not(
    eager: Recogniser, waveforms: list[FloatArray], decoder: DecoderName, second_pass: bool
) -> None:
    both = join_with_pauses([waveforms[1], waveforms[3]])
    options: dict[str, Any] = {"decoder": decoder, "second_pass": second_pass, "n_best": 2}
    without = _run(eager, both, **options)
    assert _without_interim(_run(eager, both, interim_results=True, **options)) == without


# --- final results -------------------------------------------------------------------------------


@pytest.mark.parametrize("second_pass", [True, False])
@pytest.mark.parametrize("decoder", ["greedy", "beam"])
def test_final_is_the_decoding_of_the_pass_that_was_asked_for(
    recogniser: Recogniser, waveforms: list[FloatArray], decoder: DecoderName, second_pass: bool
) -> None:
    both = join_with_pauses([waveforms[0], waveforms[3]])
    heard = (np.frombuffer(to_pcm(both), "<i2") / 32768).astype(np.float32)
    segmenter = recogniser.open_segmenter("fast", EndpointSettings(), decoder)
    events = segmenter.push(log_mel(heard, recogniser.features))
    expected = [
        recogniser.segment(
            recogniser.emission(event.utterance.features)
            if second_pass
            else event.utterance.log_probs,
            first_frame=event.utterance.first_frame,
            earliest_frame=event.utterance.earliest_frame,
            decoder=decoder,
            n_best=3,
        )
        for event in events
        if isinstance(event, UtteranceEnded)
    ]
    options: dict[str, Any] = {"profile": "fast", "second_pass": second_pass, "n_best": 3}
    assert len(expected) == 2
    assert _finals(_run(recogniser, both, decoder=decoder, **options)) == expected


@pytest.mark.parametrize("way", WAYS)
def test_word_times_count_from_the_start_of_the_stream(
    recogniser: Recogniser, waveforms: list[FloatArray], way: dict[str, Any]
) -> None:
    clip = waveforms[1]
    clip_s = len(clip) / 16_000
    both = np.concatenate([clip, noise(2.0), clip, noise(1.0)])
    first, second = _finals(_run(recogniser, both, **way))
    words = [*_words(first), *_words(second)]
    times = [time for word in words for time in (word.start_s, word.end_s)]
    assert times == sorted(times)
    assert all(word.end_s <= min(clip_s + 0.04, first.end_s) for word in _words(first))
    assert all(clip_s + 2 - 0.04 <= w.start_s < w.end_s <= second.end_s for w in _words(second))
    (alone,) = _finals(_run(recogniser, np.concatenate([clip, noise(1.0)]), **way))
    start_s = _words(alone)[0].start_s + clip_s + 2
    assert _words(second)[0].start_s == pytest.approx(start_s, abs=0.25)


@pytest.mark.parametrize("second_pass", [True, False])
@pytest.mark.parametrize("settings", [{"stop_history_ms": 160}, {"stop_threshold": 0.5}])
def test_words_follow_each_other_where_short_silences_end_utterances(
    recogniser: Recogniser, talk: FloatArray, settings: dict[str, Any], second_pass: bool
) -> None:
    endpointing = EndpointSettings(**settings)
    updates = _run(recogniser, talk, second_pass=second_pass, endpointing=endpointing)
    assert len(_finals(updates)) > 8
    words = [word for final in _finals(updates) for word in _words(final)]
    assert all(word.start_s < word.end_s for word in words)
    assert all(a.end_s <= b.start_s for a, b in pairwise(words))


# --- interim results -----------------------------------------------------------------------------


def _check_interim(update: Update) -> None:
    """Committed words, then the others, all in order."""
    results = update.results
    assert len(results) in (1, 2)
    assert all(0 <= r.stability <= 1 and len(r.segment.alternatives) == 1 for r in results)
    assert all(_words(r.segment) for r in results)
    if len(results) == 2:
        assert results[0].stability >= 0.9 > results[1].stability
        assert results[0].segment.end_s <= results[1].segment.end_s
    times = [t for r in results for w in _words(r.segment) for t in (w.start_s, w.end_s)]
    assert times == sorted(times)
    assert times[-1] <= results[-1].segment.end_s


@pytest.mark.parametrize("profile", ["fast", "balanced"])
@pytest.mark.parametrize("eou_ms", [None, 120])
@pytest.mark.parametrize("second_pass", [True, False])
@pytest.mark.parametrize("calibration", ["shipped", "eager"])
def test_committed_words_are_never_changed_by_later_interim_results(
    recogniser: Recogniser,
    eager: Recogniser,
    talk: FloatArray,
    calibration: str,
    second_pass: bool,
    eou_ms: int | None,
    profile: str,
) -> None:
    updates = _run(
        eager if calibration == "eager" else recogniser,
        talk,
        interim_results=True,
        profile=profile,
        second_pass=second_pass,
        endpointing=EndpointSettings(stop_history_eou_ms=eou_ms),
    )
    assert sum(_is_final(update) for update in updates) == 8
    committed: tuple[TimedWord, ...] = ()
    n_committed = 0
    for update in updates:
        if _is_final(update):
            if not second_pass:
                final = _words(update.results[0].segment)
                assert final[: len(committed)] == committed
            committed = ()
            continue
        _check_interim(update)
        assert _committed(update)[: len(committed)] == committed
        n_committed += len(_committed(update)) - len(committed)
        committed = _committed(update)
    assert n_committed > 20 or (calibration == "shipped" and second_pass)


def test_greedy_words_are_in_one_final_only_when_a_long_utterance_is_cut(
    eager: Recogniser, waveforms: list[FloatArray]
) -> None:
    for longest_s in (2.0, 3.0, 4.0):
        finals = _finals(
            _run(
                eager,
                waveforms[0],
                interim_results=True,
                second_pass=False,
                endpointing=EndpointSettings(longest_utterance_s=longest_s),
            )
        )
        assert len(finals) >= 2
        words = [word for final in finals for word in _words(final)]
        assert all(a.end_s <= b.start_s for a, b in pairwise(words))
        assert all(word.end_s <= final.end_s for final in finals for word in _words(final))


def test_beam_search_without_second_pass_commits_what_the_final_result_keeps(
    eager: Recogniser, waveforms: list[FloatArray]
) -> None:
    n_committed = 0
    for waveform in waveforms[:4]:
        plain = _run(eager, waveform, decoder="beam", second_pass=False)
        updates = _run(eager, waveform, decoder="beam", second_pass=False, interim_results=True)
        finals = [[w.text for w in _words(f)] for f in _finals(updates)]
        assert finals == [[w.text for w in _words(f)] for f in _finals(plain)]
        for update in updates:
            n_committed += len(_committed(update)) if _is_interim(update) else 0
    assert n_committed > 20


def test_pause_commits_everything_that_was_said(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    halting = join_with_pauses([waveforms[1], waveforms[3]], pause_s=0.6)
    settings = EndpointSettings(stop_history_eou_ms=400, stop_history_ms=2_000)
    updates = _run(recogniser, halting, interim_results=True, endpointing=settings)
    start_s = len(waveforms[1]) / 16_000 + 0.6
    before = [u for u in updates if _is_interim(u) and u.results[-1].segment.end_s < start_s]
    assert [result.stability >= 0.9 for result in before[-1].results] == [True]
    assert len(_committed(before[-1])) >= 5


@pytest.mark.parametrize("profile", ["fast", "balanced"])
def test_clip_sent_at_once_yields_one_interim_update(
    recogniser: Recogniser, waveforms: list[FloatArray], profile: str
) -> None:
    session = _open(recogniser, interim_results=True, profile=profile)
    (update,) = session.push(to_pcm(waveforms[2][:48_000]))
    assert _is_interim(update)
    assert all(not _is_interim(update) for update in session.finish())


def test_interim_results_come_only_when_wanted(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    assert not any(_is_interim(u) for u in _run(recogniser, waveforms[1]))
    offline = _run(recogniser, waveforms[1], profile=OFFLINE_PROFILE, interim_results=True)
    assert not any(_is_interim(u) for u in offline)


# --- single utterance ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_single_utterance_ends_the_stream_with_its_final(
    recogniser: Recogniser, talk: FloatArray, way: dict[str, Any]
) -> None:
    session = _open(recogniser, single_utterance=True, interim_results=True, **way)
    data = to_pcm(talk)
    updates = _without_interim(_push(session, data[: 12 * 32_000]))
    assert [u.event for u in updates] == [SpeechEvent.END_OF_SINGLE_UTTERANCE, None]
    final = updates[1].results[0]
    assert final.is_final
    assert _text(final.segment) != ""
    assert updates[0].time_s == pytest.approx(final.segment.end_s)
    assert session.is_done
    assert session.push(data[12 * 32_000 :]) == []
    assert session.end_utterance() == []
    assert list(session.finish()) == []


def test_single_utterance_in_a_file_of_many_blocks_is_one(
    recogniser: Recogniser, talk: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    soundfile.write(file, talk, 16_000, format="FLAC")
    monkeypatch.setattr(audio, "_BLOCK_FRAMES", 32_000)
    session = Session(recogniser, StreamRequest(single_utterance=True), decoder="greedy")
    updates = session.push(file.getvalue()) + list(session.finish())
    assert [u.event for u in updates] == [SpeechEvent.END_OF_SINGLE_UTTERANCE, None]


def test_single_utterance_that_has_not_ended_ends_with_the_audio(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    updates = _run(recogniser, waveforms[1], single_utterance=True)
    assert [u.event for u in updates] == [SpeechEvent.END_OF_SINGLE_UTTERANCE, None]


def test_file_that_breaks_off_gives_what_was_heard_before(
    recogniser: Recogniser, talk: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    soundfile.write(file, talk, 16_000, format="FLAC")
    monkeypatch.setattr(audio, "_BLOCK_FRAMES", 32_000)
    whole = Session(recogniser, StreamRequest(), decoder="greedy")
    expected = _finals(whole.push(file.getvalue()) + list(whole.finish()))
    data = bytearray(file.getvalue())
    half = len(data) // 2
    data[half : half + 4_000] = bytes(4_000)
    session = Session(recogniser, StreamRequest(), decoder="greedy")
    heard = session.push(bytes(data))
    with pytest.raises(AudioError, match="cannot be decoded"):
        heard.extend(session.finish())
    finals = _finals(heard)
    assert len(finals) >= 2
    assert finals == expected[: len(finals)]


# --- events --------------------------------------------------------------------------------------


def _check_alternation(updates: Sequence[Update]) -> None:
    events = [update for update in updates if update.event is not None]
    kinds = [update.event for update in events]
    assert kinds == [SpeechEvent.SPEECH_BEGAN, SpeechEvent.SPEECH_ENDED] * (len(kinds) // 2)
    times = [update.time_s for update in events]
    assert times == sorted(times)
    assert all(a.time_s < b.time_s for a, b in zip(events[::2], events[1::2], strict=True))


@pytest.mark.parametrize("settings", [{}, {"longest_utterance_s": 2.0}, {"stop_history_ms": 200}])
def test_speech_begins_and_ends_in_turn(
    recogniser: Recogniser, talk: FloatArray, settings: dict[str, Any]
) -> None:
    updates = _run(recogniser, talk, speech_events=True, endpointing=EndpointSettings(**settings))
    _check_alternation(updates)
    assert len(_events(updates)) >= 16
    ends_s = [u.time_s for u in updates if u.event is SpeechEvent.SPEECH_ENDED]
    finals_s = [f.end_s for f in _finals(updates)]
    assert len(finals_s) >= len(ends_s) - 1  # a sound may be no word
    assert all(any(end_s == pytest.approx(t) for t in ends_s) for end_s in finals_s)


def test_speech_that_the_end_of_the_audio_reveals_begins_before_it_ends(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    updates = _run(recogniser, waveforms[1][8_000:14_000], speech_events=True)
    assert _events(updates) == [SpeechEvent.SPEECH_BEGAN, SpeechEvent.SPEECH_ENDED]
    _check_alternation(updates)


def test_speech_that_the_sender_ends_begins_before_it_ends(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    session = _open(recogniser, speech_events=True)
    updates = session.push(to_pcm(waveforms[1][8_000:14_000])) + session.end_utterance()
    assert _events(updates) == [SpeechEvent.SPEECH_BEGAN, SpeechEvent.SPEECH_ENDED]
    _check_alternation(updates + session.push(to_pcm(waveforms[1])) + list(session.finish()))


def test_events_come_only_when_wanted(recogniser: Recogniser, waveforms: list[FloatArray]) -> None:
    assert _events(_run(recogniser, waveforms[1])) == []


# --- the sender ends utterances ------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_end_utterance_gives_a_final_at_once_and_the_rest_is_recognised_behind_it(
    recogniser: Recogniser, waveforms: list[FloatArray], way: dict[str, Any]
) -> None:
    data = to_pcm(waveforms[0])
    session = _open(recogniser, **way)
    assert _push(session, data[: 3 * 32_000]) == []
    (first,) = _finals(session.end_utterance())
    assert first.end_s == pytest.approx(3.0, abs=0.1)
    assert session.end_utterance() == []
    (second,) = _finals(_push(session, data[3 * 32_000 :]) + list(session.finish()))
    assert len(_words(first)) >= 3
    assert len(_words(second)) >= 3
    assert _words(first)[-1].end_s <= first.end_s <= _words(second)[0].start_s


def test_end_utterance_is_nothing_in_silence(recogniser: Recogniser) -> None:
    session = _open(recogniser, interim_results=True)
    assert session.end_utterance() == []
    assert session.push(to_pcm(noise(3.0))) == []
    assert session.end_utterance() == []


# --- no speech -----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.0, 3e-4, 1e-2, 0.1])
def test_forty_seconds_without_speech_give_one_empty_final_at_the_end(
    recogniser: Recogniser, level: float
) -> None:
    session = _open(recogniser, interim_results=True, speech_events=True)
    window_frames = recogniser.profiles["balanced"].window_feature_frames / recogniser.subsampling
    most = PRE_ROLL_S / recogniser.frame_s + window_frames
    data = to_pcm(noise(40.0, level=level))
    for start in range(0, len(data), 32_000):
        assert session.push(data[start : start + 32_000]) == []
        assert len(session._channels[0]._segmenter._features) <= most
    (update,) = session.finish()
    (result,) = update.results
    assert (result.is_final, _text(result.segment)) == (True, "")
    assert result.segment.end_s == pytest.approx(40.0, abs=0.1)


def test_silence_behind_speech_adds_no_result(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    long = np.concatenate([waveforms[1], noise(10.0)])
    assert len(_finals(_run(recogniser, long))) == 1


def test_stream_without_bytes_gives_nothing(recogniser: Recogniser) -> None:
    session = _open(recogniser)
    assert session.push(b"") == []
    assert list(session.finish()) == []


@pytest.mark.parametrize("n_samples", [1, 200, 399, 400, 1_000])
@pytest.mark.parametrize("way", WAYS)
def test_stream_of_less_than_a_window_gives_one_final(
    recogniser: Recogniser, n_samples: int, way: dict[str, Any]
) -> None:
    for decoder in ("greedy", "beam"):
        updates = _run(recogniser, noise(1.0)[:n_samples], decoder=decoder, **way)
        assert [_text(final) for final in _finals(updates)] == [""]


# --- requests that cannot be served --------------------------------------------------------------


def test_offline_profile_without_second_pass_is_refused(recogniser: Recogniser) -> None:
    with pytest.raises(RequestError, match="offline is the second pass; ask for another profile"):
        _open(recogniser, profile=OFFLINE_PROFILE, second_pass=False)


def test_unknown_profile_is_refused_with_those_there_are(recogniser: Recogniser) -> None:
    with pytest.raises(RequestError) as caught:
        _open(recogniser, profile="turbo")
    assert "'turbo'" in str(caught.value)
    assert all(name in str(caught.value) for name in ("fast", "balanced", "offline"))


def test_broken_audio_is_refused_and_other_sessions_go_on(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    other = _open(recogniser)
    data = to_pcm(waveforms[1])
    before = _push(other, data[:32_000])
    broken = Session(recogniser, StreamRequest(), decoder="greedy")
    with pytest.raises(AudioError, match="no header"):
        broken.push(b"dear server, this is a letter and no audio at all. " * 20)
    updates = before + _push(other, data[32_000:]) + list(other.finish())
    assert updates == _run(recogniser, waveforms[1])


# --- nobody speaks -------------------------------------------------------------------------------


def _timeouts(updates: Iterable[Update]) -> list[float]:
    return [update.time_s for update in updates if update.event is SpeechEvent.TIMEOUT]


@pytest.mark.parametrize("way", WAYS)
def test_stream_in_which_nobody_begins_to_speak_ends(
    recogniser: Recogniser, waveforms: list[FloatArray], way: dict[str, Any]
) -> None:
    late = to_pcm(np.concatenate([noise(6.0), waveforms[1], noise(1.0)]))
    session = _open(recogniser, speech_start_timeout_s=2.0, speech_events=True, **way)
    updates = _push(session, late)
    assert updates == [Update(event=SpeechEvent.TIMEOUT, time_s=2.0)]
    assert session.is_done
    assert session.push(late) == []
    assert session.end_utterance() == []
    assert list(session.finish()) == []


@pytest.mark.parametrize("way", WAYS)
def test_stream_in_which_nobody_goes_on_speaking_ends_behind_its_final(
    recogniser: Recogniser, waveforms: list[FloatArray], way: dict[str, Any]
) -> None:
    halting = np.concatenate([waveforms[1], noise(6.0), waveforms[3], noise(1.0)])
    options: dict[str, Any] = {"speech_end_timeout_s": 3.0, "speech_events": True, **way}
    updates = _run(recogniser, halting, **options)
    plain = _run(recogniser, halting, speech_events=True, **way)
    assert len(_finals(plain)) == 2
    assert _finals(updates) == _finals(plain)[:1]
    assert _events(updates) == [
        SpeechEvent.SPEECH_BEGAN,
        SpeechEvent.SPEECH_ENDED,
        SpeechEvent.TIMEOUT,
    ]
    assert _timeouts(updates) == [pytest.approx(_finals(plain)[0].end_s + 3.0)]


def test_timeouts_longer_than_the_silences_change_nothing(
    recogniser: Recogniser, talk: FloatArray
) -> None:
    plain = _run(recogniser, talk, interim_results=True, speech_events=True)
    patient = _run(
        recogniser,
        talk,
        interim_results=True,
        speech_events=True,
        speech_start_timeout_s=5.0,
        speech_end_timeout_s=5.0,
    )
    assert patient == plain


def test_start_timeout_does_not_end_silences_after_speech_nor_end_timeout_those_before(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    slow = np.concatenate([noise(4.0), waveforms[1], noise(4.0), waveforms[3], noise(1.0)])
    assert _timeouts(_run(recogniser, slow[4 * 16_000 :], speech_start_timeout_s=2.0)) == []
    updates = _run(recogniser, slow[: 11 * 16_000], speech_end_timeout_s=3.5)
    assert len(_finals(updates)) == 1
    assert _timeouts(updates) == []


@pytest.mark.parametrize("quiet_s", [0.0, 1.0, 1.3, 5.0])
def test_timeouts_are_the_same_for_any_chunking(
    recogniser: Recogniser, waveforms: list[FloatArray], quiet_s: float
) -> None:
    waveform = np.concatenate([noise(quiet_s), waveforms[1], noise(5.0), waveforms[3]])
    options: dict[str, Any] = {
        "speech_start_timeout_s": 2.0,
        "speech_end_timeout_s": 2.0,
        "speech_events": True,
    }
    expected = _run(recogniser, waveform, (3200,), **options)
    assert len(_timeouts(expected)) == 1
    for sizes in ((1 << 20,), (1, 7_777, 401, 20_001), (64_000,)):
        assert _run(recogniser, waveform, sizes, **options) == expected


@pytest.mark.parametrize("profile", ["fast", "balanced", OFFLINE_PROFILE])
def test_who_began_to_speak_in_time_is_heard_although_that_is_known_later(
    recogniser: Recogniser, waveforms: list[FloatArray], profile: str
) -> None:
    options: dict[str, Any] = {"profile": profile, "speech_events": True}
    waveform = np.concatenate([noise(1.3), waveforms[1], noise(1.0)])
    plain = _run(recogniser, waveform, **options)
    began_s = plain[0].time_s
    assert began_s > 1.5
    assert _run(recogniser, waveform, speech_start_timeout_s=began_s + 0.1, **options) == plain


# --- separate channels ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stereo(waveforms: list[FloatArray]) -> FloatArray:
    """Two people who speak at different times, one a channel, (time, 2)."""
    left = np.concatenate([waveforms[1], noise(5.0)])
    right = np.concatenate([noise(3.0), waveforms[3], noise(9.0)])[: len(left)]
    return np.stack([left, right], axis=1)


def _open_stereo(recogniser: Recogniser, **options: Any) -> Session:
    audio_format = dataclasses.replace(PCM, n_channels=2)
    request = StreamRequest(audio=audio_format, separates_channels=True, **options)
    return Session(recogniser, request, decoder="greedy")


@pytest.mark.parametrize("way", WAYS)
def test_each_channel_is_told_what_it_would_be_told_alone(
    recogniser: Recogniser, stereo: FloatArray, way: dict[str, Any]
) -> None:
    options = {"speech_events": True, "interim_results": True, "n_best": 2, **way}
    pcm = to_pcm(stereo.ravel())
    for sizes in ((6400,), (1, 7_777, 401, 20_001)):
        session = _open_stereo(recogniser, **options)
        updates = _without_interim(_push(session, pcm, sizes) + list(session.finish()))
        assert session.audio_s == pytest.approx(len(stereo) / 16_000)
        for channel in (1, 2):
            mine = [
                dataclasses.replace(update, channel=0)
                for update in updates
                if update.channel == channel
            ]
            assert len(_finals(mine)) == 1
            alone = _run(recogniser, stereo[:, channel - 1], **options)
            assert mine == _without_interim(alone)


def test_channels_know_nothing_of_each_other(recogniser: Recogniser, stereo: FloatArray) -> None:
    silent = stereo.copy()
    silent[:, 1] = 0.0
    session = _open_stereo(recogniser)
    updates = session.push(to_pcm(silent.ravel())) + list(session.finish())
    texts = {u.channel: _text(u.results[0].segment) for u in updates}
    (alone,) = _finals(_run(recogniser, stereo[:, 0]))
    assert texts == {1: _text(alone), 2: ""}


def test_channels_that_are_averaged_have_no_number(
    recogniser: Recogniser, stereo: FloatArray
) -> None:
    request = StreamRequest(audio=dataclasses.replace(PCM, n_channels=2), speech_events=True)
    session = Session(recogniser, request, decoder="greedy")
    updates = session.push(to_pcm(stereo.ravel())) + list(session.finish())
    assert len(updates) >= 3
    assert {update.channel for update in updates} == {0}


def test_sender_ends_the_utterances_of_all_channels(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    n_samples = min(len(waveforms[1]), len(waveforms[3]))
    both = np.stack([waveforms[1][:n_samples], waveforms[3][:n_samples]], axis=1)
    session = _open_stereo(recogniser)
    assert _push(session, to_pcm(both[: 2 * 16_000].ravel())) == []
    ended = session.end_utterance()
    assert [(u.channel, u.results[0].is_final) for u in ended] == [(1, True), (2, True)]
    assert all(_text(u.results[0].segment) for u in ended)


def test_stream_is_over_when_every_channel_is(recogniser: Recogniser, stereo: FloatArray) -> None:
    session = _open_stereo(recogniser, single_utterance=True)
    pcm = to_pcm(stereo.ravel())
    done_at = {}
    for start in range(0, len(pcm), 6400):
        for update in session.push(pcm[start : start + 6400]):
            if update.event is SpeechEvent.END_OF_SINGLE_UTTERANCE:
                done_at[update.channel] = start
        assert session.is_done == (len(done_at) == 2)
    assert done_at[1] < done_at[2]


def test_wav_header_says_how_many_channels_there_are(
    recogniser: Recogniser, stereo: FloatArray
) -> None:
    file = io.BytesIO()
    samples = np.frombuffer(to_pcm(stereo.ravel()), "<i2").reshape(-1, 2)
    soundfile.write(file, samples, 16_000, format="WAV", subtype="PCM_16")
    session = Session(recogniser, StreamRequest(separates_channels=True), decoder="greedy")
    updates = _push(session, file.getvalue(), (10, 34, 6_399)) + list(session.finish())
    expected = _open_stereo(recogniser)
    assert updates == _push(expected, to_pcm(stereo.ravel())) + list(expected.finish())
