"""Requests as they are carried out, on the shipped model: results, refusals, ends of all kinds."""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import soundfile
from conftest import join_with_pauses, noise

from service import calls as calls_module
from service import profanity
from service.admission import Admission, Limits
from service.audio import AudioFormat, Encoding, to_pcm
from service.calls import Calls, EndUtterance, Piece
from service.decoding.hypothesis import Phrase
from service.errors import AudioError, IdleError, InputError, OverloadError, RequestError
from service.metrics import Metrics
from service.models import Model, Models
from service.recogniser import DecoderName, FloatArray, Recogniser, Segment
from service.request import Request, StreamRequest
from service.scheduler import BatchSettings, Scheduler
from service.session import Session, Update

T = TypeVar("T")

PCM = AudioFormat(Encoding.LINEAR16, sample_rate=16_000)
PATIENCE_S = 30.0
GREEDY = Request(audio=PCM, decoder="greedy")
STREAM = StreamRequest(audio=PCM, decoder="greedy")


def _model(recogniser: Recogniser, batches: BatchSettings) -> Model:
    """The loaded bundle behind a scheduler of its own."""
    engines = recogniser.engine, recogniser.streaming_engine
    scheduler = Scheduler(*engines, batches)
    live, offline = (
        replace(
            recogniser,
            engine=scheduler.engine(priority),
            streaming_engine=scheduler.streaming_engine(priority),
            decoders={n: scheduler.decoder(d, priority) for n, d in recogniser.decoders.items()},
            utterances_at_once=batches.n_lanes * batches.most_utterances,
        )
        for priority in ("live", "offline")
    )
    return Model(Path("en-small"), "", live, offline, scheduler)


@contextmanager
def _calls(
    recogniser: Recogniser,
    *,
    decoder: DecoderName | None = "beam",
    n_threads: int = 2,
    **limits: Any,
) -> Iterator[Calls]:
    """What takes requests; at the end, no place and no model may be in use."""
    threads_before = set(threading.enumerate())
    model = _model(recogniser, BatchSettings(n_lanes=n_threads))
    admission = Admission(Limits(**limits))
    calls = Calls(
        Models(lambda _: model, [model.folder]),
        admission,
        Metrics(),
        default_decoder=decoder,
        n_threads=n_threads,
    )
    try:
        yield calls
    finally:
        calls.close()
    assert _n_in_use(calls) == (0, 0, 0, 0)
    assert not {t for t in set(threading.enumerate()) - threads_before if t.name != "asyncio_0"}


def _n_in_use(calls: Calls) -> tuple[int, int, int, int]:
    """Places of streams and of recordings, users of models, streams of schedulers."""
    n_streams = sum(model.scheduler._n_streams for model in calls.models.loaded)
    n_users = sum(calls.models._n_users.values())
    return calls.admission.n_streams, calls.admission.n_recordings, n_users, n_streams


def _run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 120))


async def _pieces(data: bytes, size: int = 32_000) -> AsyncIterator[Piece]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def _silent_after(data: bytes) -> AsyncIterator[Piece]:
    yield data
    await asyncio.Event().wait()


async def _stream(
    calls: Calls, request: StreamRequest, pieces: AsyncIterator[Piece], client: str | None = None
) -> list[Update]:
    return [update async for update, _ in calls.stream(request, pieces, client=client)]


async def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.002)


def _heard(waveform: FloatArray) -> FloatArray:
    """A waveform as 16-bit samples carry it."""
    return (np.frombuffer(to_pcm(waveform), "<i2") / 32768).astype(np.float32)


def _file(samples: FloatArray, file_format: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    pcm = (np.clip(samples, -1, 1) * 32767).astype("<i2")
    soundfile.write(buffer, pcm, 16_000, format=file_format, subtype="PCM_16")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def stereo(waveforms: list[FloatArray]) -> FloatArray:
    """Two people, one a channel, (time, 2)."""
    n_samples = max(len(waveforms[1]), len(waveforms[3])) + 16_000
    quiet = noise(n_samples / 16_000)
    channels = [np.concatenate([w, quiet[len(w) :]]) for w in (waveforms[1], waveforms[3])]
    return np.stack(channels, axis=1)


def _texts(segments: list[Segment]) -> list[str]:
    return [segment.alternatives[0].transcript for segment in segments]


def _finals(updates: list[Update], channel: int = 0) -> list[Segment]:
    return [
        result.segment
        for update in updates
        for result in update.results
        if result.is_final and update.channel == channel
    ]


# --- recordings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["greedy", "beam"])
def test_recording_gives_what_the_recogniser_gives(
    recogniser: Recogniser, waveforms: list[FloatArray], decoder: Any
) -> None:
    phrases = (Phrase("bartley alexander", 5.0),)
    expected = recogniser.recognise(
        _heard(waveforms[1]), decoder=decoder, n_best=3, phrases=phrases
    )
    request = Request(audio=PCM, decoder=decoder, n_best=3, phrases=phrases)
    with _calls(recogniser) as calls:
        found = _run(calls.recognise(request, to_pcm(waveforms[1])))
    assert found.segments == tuple((0, segment) for segment in expected)
    assert found.duration_s == pytest.approx(len(waveforms[1]) / 16_000)
    assert found.language == "en-US"


def test_long_recording_gives_what_the_recogniser_gives_and_tells_its_progress(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    long = join_with_pauses([*waveforms, *waveforms[:3]])
    expected = recogniser.recognise(_heard(long), decoder="greedy")
    done_s: list[float] = []
    with _calls(recogniser) as calls:
        found = _run(calls.recognise(GREEDY, to_pcm(long), on_audio=done_s.append))
        registry = calls.metrics.registry
        recorded_s = registry.get_sample_value("voxgate_audio_seconds_total", {"kind": "recording"})
    assert len(expected) > 5
    assert [segment for _, segment in found.segments] == expected
    assert len(done_s) > 5
    assert sum(done_s) == pytest.approx(len(long) / 16_000, abs=0.1)
    assert recorded_s == pytest.approx(len(long) / 16_000)


@pytest.mark.parametrize("file_format", ["WAV", "FLAC", "RAW"])
def test_channels_of_a_recording_are_recognised_separately(
    recogniser: Recogniser, stereo: FloatArray, file_format: str
) -> None:
    is_raw = file_format == "RAW"
    content = to_pcm(stereo.ravel()) if is_raw else _file(stereo, file_format)
    audio = replace(PCM, n_channels=2) if is_raw else AudioFormat()
    request = Request(audio=audio, decoder="greedy", separates_channels=True)
    with _calls(recogniser) as calls:
        found = _run(calls.recognise(request, content))
    assert found.duration_s == pytest.approx(len(stereo) / 16_000)
    for channel in (1, 2):
        mine = [segment for number, segment in found.segments if number == channel]
        expected = recogniser.recognise(_heard(stereo[:, channel - 1]), decoder="greedy")
        assert _texts(mine) == _texts(expected)
    texts = _texts([segment for _, segment in found.segments])
    assert len(set(texts)) == 2
    assert all(texts)
    ends = [(segment.end_s, number) for number, segment in found.segments]
    assert ends == sorted(ends)


def test_channels_that_are_averaged_are_channel_0(
    recogniser: Recogniser, stereo: FloatArray
) -> None:
    expected = recogniser.recognise(_heard(stereo[:, 0]), decoder="greedy")
    twice = np.repeat(stereo[:, :1], 2, axis=1)
    with _calls(recogniser) as calls:
        request = Request(decoder="greedy")
        found = _run(calls.recognise(request, _file(twice)))
        updates = _run(_stream(calls, StreamRequest(decoder="greedy"), _pieces(_file(twice))))
    assert [channel for channel, _ in found.segments] == [0]
    assert _texts([segment for _, segment in found.segments]) == _texts(expected)
    assert {update.channel for update in updates} == {0}


def test_single_channel_recognised_separately_is_channel_1(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    expected = recogniser.recognise(_heard(waveforms[1]), decoder="greedy")
    with _calls(recogniser) as calls:
        request = replace(GREEDY, separates_channels=True)
        found = _run(calls.recognise(request, to_pcm(waveforms[1])))
    assert found.segments == ((1, expected[0]),)


def test_recording_that_is_too_long_is_refused_before_it_is_decoded(
    recogniser: Recogniser, waveforms: list[FloatArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it was decoded")

    with _calls(recogniser, longest_recording_s=3.0) as calls:
        assert _run(calls.recognise(GREEDY, to_pcm(waveforms[1][:48_000]))).segments
        monkeypatch.setattr(calls_module, "decode_blocks", fail)
        for content in (to_pcm(waveforms[1]), _file(waveforms[1], "FLAC")):
            with pytest.raises(AudioError, match="expected at most 3;"):
                _run(calls.recognise(Request(decoder="greedy"), content))
        with pytest.raises(AudioError, match="empty"):
            _run(calls.recognise(GREEDY, b""))


def test_recordings_beyond_the_limit_are_refused_while_others_wait(
    recogniser: Recogniser, waveforms: list[FloatArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = _Gate(Recogniser.segment)
    monkeypatch.setattr(Recogniser, "segment", gate.method)

    async def run(calls: Calls) -> None:
        pcm = to_pcm(waveforms[1])
        first = asyncio.create_task(calls.recognise(GREEDY, pcm))
        second = asyncio.create_task(calls.recognise(GREEDY, pcm))
        await _until(lambda: calls.admission.n_recordings == 2)
        assert calls.admission.queued_audio_s == pytest.approx(2 * len(pcm) / 32_000)
        with pytest.raises(OverloadError) as refused:
            await calls.recognise(GREEDY, pcm)
        assert refused.value.retry_s > 0
        gate.open.set()
        assert (await first).segments == (await second).segments
        assert (await calls.recognise(GREEDY, pcm)).segments == first.result().segments

    with _calls(recogniser, n_threads=1, recordings=2) as calls:
        _run(run(calls))


# --- recordings that are cancelled ---------------------------------------------------------------


class _Gate:
    """Stands before a method: counts its calls and holds them until it is open."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.open = threading.Event()
        self.n_calls = 0

        def method(*arguments: Any, **options: Any) -> Any:
            self.n_calls += 1
            assert self.open.wait(PATIENCE_S)
            return inner(*arguments, **options)

        self.method = method


def test_cancelled_recording_frees_its_place_at_once_and_its_work_stops(
    recogniser: Recogniser, waveforms: list[FloatArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = _Gate(Recogniser.segment)
    monkeypatch.setattr(Recogniser, "segment", gate.method)
    long = to_pcm(join_with_pauses([*waveforms, *waveforms[:3]]))

    async def run(calls: Calls) -> None:
        task = asyncio.create_task(calls.recognise(GREEDY, long))
        await _until(lambda: gate.n_calls == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert calls.admission.n_recordings == 0
        assert calls.admission.queued_audio_s == 0.0
        assert _n_in_use(calls)[2] == 1  # the model stays until its thread has let go
        gate.open.set()
        await _until(lambda: _n_in_use(calls)[2] == 0)
        assert gate.n_calls == 1
        found = await calls.recognise(GREEDY, to_pcm(waveforms[1]))
        assert _texts([segment for _, segment in found.segments])[0]

    with _calls(recogniser, recordings=1) as calls:
        _run(run(calls))


def test_recording_cancelled_before_its_turn_is_never_recognised(
    recogniser: Recogniser, waveforms: list[FloatArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = _Gate(Recogniser.segment)
    monkeypatch.setattr(Recogniser, "segment", gate.method)
    pcm = to_pcm(waveforms[1])

    async def run(calls: Calls) -> None:
        running = asyncio.create_task(calls.recognise(GREEDY, pcm))
        await _until(lambda: gate.n_calls == 1)
        waiting = asyncio.create_task(calls.recognise(GREEDY, pcm))
        await _until(lambda: calls.admission.n_recordings == 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert calls.admission.n_recordings == 1
        gate.open.set()
        await running
        await calls.recognise(GREEDY, pcm)  # behind it in the queue
        assert gate.n_calls == 2

    with _calls(recogniser, n_threads=1) as calls:
        _run(run(calls))


# --- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["greedy", "beam"])
@pytest.mark.parametrize("second_pass", [True, False])
def test_stream_gives_what_its_session_gives(
    recogniser: Recogniser, waveforms: list[FloatArray], decoder: Any, second_pass: bool
) -> None:
    both = to_pcm(join_with_pauses([waveforms[1], waveforms[3]]))
    request = StreamRequest(
        audio=PCM,
        decoder=decoder,
        second_pass=second_pass,
        interim_results=True,
        speech_events=True,
        n_best=2,
    )

    async def pieces() -> AsyncIterator[Piece]:
        async for piece in _pieces(both[:64_000]):
            yield piece
        yield EndUtterance()
        async for piece in _pieces(both[64_000:]):
            yield piece

    session = Session(recogniser, request, decoder=decoder)
    expected = [u for i in (0, 32_000) for u in session.push(both[i : i + 32_000])]
    expected += session.end_utterance()
    for i in range(64_000, len(both), 32_000):
        expected += session.push(both[i : i + 32_000])
    expected += session.finish()
    with _calls(recogniser) as calls:
        found = _run(_stream(calls, request, pieces()))
        value = calls.metrics.registry.get_sample_value
        assert value("voxgate_audio_seconds_total", {"kind": "stream"}) == pytest.approx(
            len(both) / 32_000
        )
        n_finals = value("voxgate_results_total", {"kind": "final"})
    assert found == expected
    assert len(_finals(found)) == n_finals == 3


@pytest.mark.parametrize("is_raw", [True, False])
def test_channels_of_a_stream_are_recognised_separately(
    recogniser: Recogniser, stereo: FloatArray, is_raw: bool
) -> None:
    content = to_pcm(stereo.ravel()) if is_raw else _file(stereo)
    audio = replace(PCM, n_channels=2) if is_raw else AudioFormat()
    request = StreamRequest(
        audio=audio, decoder="greedy", separates_channels=True, interim_results=True
    )
    with _calls(recogniser) as calls:
        updates = _run(_stream(calls, request, _pieces(content, 3_210)))
    assert {update.channel for update in updates} == {1, 2}
    for channel in (1, 2):
        session = Session(recogniser, STREAM, decoder="greedy")
        alone = session.push(to_pcm(stereo[:, channel - 1])) + list(session.finish())
        assert _texts(_finals(updates, channel)) == _texts(_finals(alone))
    assert _texts(_finals(updates, 1)) != _texts(_finals(updates, 2))


def test_stream_that_is_over_early_asks_for_no_more_audio(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    data = to_pcm(join_with_pauses([waveforms[1], waveforms[3]]))
    n_sent = 0

    async def pieces() -> AsyncIterator[Piece]:
        nonlocal n_sent
        async for piece in _pieces(data):
            n_sent += 1
            yield piece

    with _calls(recogniser) as calls:
        updates = _run(_stream(calls, replace(STREAM, single_utterance=True), pieces()))
    assert len(_finals(updates)) == 1
    assert n_sent < len(data) // 32_000


def test_streams_of_one_client_are_limited(recogniser: Recogniser) -> None:
    async def run(calls: Calls) -> None:
        first = calls.stream(STREAM, _silent_after(bytes(3_200)), client="anna")
        task = asyncio.ensure_future(anext(first))
        await _until(lambda: calls.admission.n_streams == 1)
        with pytest.raises(OverloadError, match="anna has all of its 1 streams"):
            await _stream(calls, STREAM, _pieces(bytes(3_200)), client="anna")
        assert await _stream(calls, STREAM, _pieces(bytes(3_200)), client="bela")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with _calls(recogniser, streams_per_client=1) as calls:
        _run(run(calls))


def test_stream_that_is_too_long_is_refused_where_it_exceeds(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    data = to_pcm(waveforms[1])

    async def run(calls: Calls) -> None:
        assert _finals(await _stream(calls, STREAM, _pieces(data[:64_000])))
        with pytest.raises(AudioError, match="too long"):
            await _stream(calls, STREAM, _pieces(data))
        assert _n_in_use(calls) == (0, 0, 0, 0)

    with _calls(recogniser, longest_stream_s=2.0) as calls:
        _run(run(calls))


# --- streams that end otherwise ------------------------------------------------------------------


def test_compressed_stream_is_refused_where_it_is_too_large_to_keep(
    recogniser: Recogniser,
) -> None:
    data = _file(noise(2.0, level=0.1), "FLAC")
    with _calls(recogniser, compressed_stream_bytes=len(data) // 2) as calls:
        with pytest.raises(AudioError, match="send PCM"):
            _run(_stream(calls, StreamRequest(), _pieces(data, 1000)))
        assert _n_in_use(calls)[0] == 0
    with _calls(recogniser, compressed_stream_bytes=len(data)) as calls:
        assert _finals(_run(_stream(calls, StreamRequest(), _pieces(data, 1000))))


def test_silent_sender_is_told_that_it_was_silent(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    async def run(calls: Calls) -> None:
        with pytest.raises(IdleError, match=r"no audio for 0.2 s"):
            await _stream(calls, STREAM, _silent_after(to_pcm(waveforms[1])))
        assert _n_in_use(calls) == (0, 0, 0, 0)

    with _calls(recogniser, idle_s=0.2) as calls:
        _run(run(calls))


def test_slow_server_and_slow_reader_are_no_silence_of_the_sender(
    recogniser: Recogniser, waveforms: list[FloatArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: Any) -> Session:
        time.sleep(0.4)
        return Session(*arguments[:2], decoder="greedy")

    monkeypatch.setattr(calls_module, "Session", lambda *a, **_: slow(*a))
    data = to_pcm(np.concatenate([waveforms[1], noise(1.0)]))

    async def run(calls: Calls) -> int:
        n_updates = 0
        async for _ in calls.stream(STREAM, _pieces(data), client=None):
            await asyncio.sleep(0.4)
            n_updates += 1
        return n_updates

    with _calls(recogniser, idle_s=0.2) as calls:
        assert _run(run(calls)) == 1


def test_cancelled_stream_that_waits_for_audio_is_cancelled_and_not_idle(
    recogniser: Recogniser,
) -> None:
    async def run(calls: Calls) -> None:
        task = asyncio.create_task(_stream(calls, STREAM, _silent_after(bytes(3_200))))
        await _until(lambda: _n_in_use(calls) == (1, 0, 1, 1))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert _n_in_use(calls) == (0, 0, 0, 0)

    with _calls(recogniser) as calls:
        _run(run(calls))


def test_abandoned_stream_frees_its_place(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    async def run(calls: Calls) -> None:
        data = to_pcm(join_with_pauses([waveforms[1], waveforms[3]]))
        updates = calls.stream(STREAM, _pieces(data), client="anna")
        async for update, language in updates:
            assert _finals([update])
            assert language == "en-US"
            break
        assert _n_in_use(calls) == (1, 0, 1, 1)
        await updates.aclose()  # type: ignore[attr-defined]  # it is a generator
        assert _n_in_use(calls) == (0, 0, 0, 0)

    with _calls(recogniser) as calls:
        _run(run(calls))


def test_stream_whose_audio_or_sender_fails_frees_its_place(recogniser: Recogniser) -> None:
    async def fail() -> AsyncIterator[Piece]:
        yield bytes(3_200)
        raise RequestError("something else than audio")

    async def run(calls: Calls) -> None:
        with pytest.raises(RequestError, match="something else"):
            await _stream(calls, STREAM, fail())
        no_audio = _pieces(b"dear server, this is a letter " * 100)
        with pytest.raises(AudioError):
            await _stream(calls, StreamRequest(), no_audio)
        for request in (
            replace(STREAM, model="nobody"),
            replace(STREAM, language="fr"),
            replace(STREAM, profile="turbo"),
            replace(STREAM, decoder="reference"),
        ):
            with pytest.raises(RequestError):
                await _stream(calls, request, _pieces(bytes(3_200)))
        assert _n_in_use(calls) == (0, 0, 0, 0)

    with _calls(recogniser) as calls:
        _run(run(calls))


def test_stream_cancelled_while_it_is_opened_holds_its_model_until_that_is_over(
    recogniser: Recogniser, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = _Gate(Session)
    monkeypatch.setattr(calls_module, "Session", gate.method)

    async def run(calls: Calls) -> None:
        task = asyncio.create_task(_stream(calls, STREAM, _pieces(bytes(3_200))))
        await _until(lambda: gate.n_calls == 1)
        task.cancel()
        await asyncio.sleep(0.02)
        assert not task.done()
        assert _n_in_use(calls) == (1, 0, 1, 1)
        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert _n_in_use(calls) == (0, 0, 0, 0)

    with _calls(recogniser) as calls:
        _run(run(calls))


def test_stream_cancelled_while_the_model_works_frees_its_place_and_others_go_on(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    gate = _Gate(recogniser.streaming_engine.step)

    class Gated:
        initial_state = staticmethod(recogniser.streaming_engine.initial_state)
        step = staticmethod(gate.method)

    async def run(calls: Calls) -> None:
        data = to_pcm(waveforms[1])
        tasks = [asyncio.create_task(_stream(calls, STREAM, _pieces(data))) for _ in range(4)]
        await _until(lambda: gate.n_calls >= 1 and _n_in_use(calls)[2] == 4)
        for task in tasks[:3]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks[:3], return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        assert _n_in_use(calls) == (1, 0, 1, 1)
        gate.open.set()
        assert _texts(_finals(await tasks[3]))[0]

    with _calls(replace(recogniser, streaming_engine=Gated()), n_threads=1) as calls:
        _run(run(calls))


def test_error_of_the_model_ends_the_stream_that_caused_it_alone(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    n_steps = 0

    def step(*arguments: Any, **options: Any) -> Any:
        nonlocal n_steps
        n_steps += 1
        if n_steps == 2:
            raise ZeroDivisionError
        return recogniser.streaming_engine.step(*arguments, **options)

    class Breaking:
        initial_state = staticmethod(recogniser.streaming_engine.initial_state)

    Breaking.step = staticmethod(step)  # type: ignore[attr-defined]  # it needs the count
    fragile = replace(recogniser, streaming_engine=Breaking())  # type: ignore[arg-type]

    async def run(calls: Calls) -> None:
        data = to_pcm(waveforms[1])
        with pytest.raises(ZeroDivisionError):
            await _stream(calls, STREAM, _pieces(data))
        assert _texts(_finals(await _stream(calls, STREAM, _pieces(data))))[0]

    with _calls(fragile) as calls:
        _run(run(calls))


def test_200_streams_cancelled_at_random_moments_leave_nothing_behind(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    draw = random.Random(0)
    data = to_pcm(waveforms[1])
    request = replace(STREAM, second_pass=False, profile="fast", interim_results=True)

    async def pieces() -> AsyncIterator[Piece]:
        for start in range(0, len(data), 6_400):
            yield data[start : start + 6_400]
            await asyncio.sleep(draw.random() / 10)

    async def read(calls: Calls, *, most: int) -> None:
        updates = calls.stream(request, pieces(), client=f"client-{most}")
        async with contextlib.aclosing(updates):  # type: ignore[type-var]  # a generator
            n_updates = 0
            async for _ in updates:
                n_updates += 1
                if n_updates > most:
                    return

    async def run(calls: Calls) -> None:
        tasks = [asyncio.create_task(read(calls, most=draw.randrange(9))) for _ in range(200)]
        await _until(lambda: calls.admission.n_streams > 150)
        draw.shuffle(tasks)
        for number, task in enumerate(tasks):
            task.cancel()
            if number % 8 == 0:
                await asyncio.sleep(draw.random() / 50)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(o is None or isinstance(o, asyncio.CancelledError) for o in outcomes)
        assert any(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        assert _n_in_use(calls) == (0, 0, 0, 0)
        assert not calls.admission._n_streams_of
        assert _texts(_finals(await _stream(calls, request, _pieces(data))))[0]

    n_threads_before = threading.active_count()
    with _calls(recogniser) as calls:
        _run(run(calls))
        pools = (calls._other_threads, calls._recording_threads)
        n_allowed = sum(pool._max_workers for pool in pools) + 2  # and the lanes
        assert threading.active_count() - n_threads_before <= n_allowed


# --- what both have ------------------------------------------------------------------------------


def test_profane_words_are_masked_where_that_is_wanted(
    recogniser: Recogniser, waveforms: list[FloatArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = to_pcm(np.concatenate([waveforms[3], noise(1.0)]))
    streamed = replace(STREAM, interim_results=True, second_pass=False)
    with _calls(recogniser) as calls:
        plain = _run(calls.recognise(GREEDY, content)).segments[0][1]
        target = max(_texts([plain])[0].split(), key=len)
        masked = target[0] + "*" * (len(target) - 1)
        monkeypatch.setattr(profanity, "is_profane", lambda word: word == target)
        assert _run(calls.recognise(GREEDY, content)).segments[0][1] == plain
        wanted = replace(GREEDY, masks_profanity=True)
        found = _run(calls.recognise(wanted, content)).segments[0][1]
        assert _texts([found]) == [_texts([plain])[0].replace(target, masked)]

        updates = _run(_stream(calls, streamed, _pieces(content, 3_200)))
        texts = [r.segment.alternatives[0].transcript for u in updates for r in u.results]
        target = max(texts[-1].split(), key=len)
        masked = target[0] + "*" * (len(target) - 1)
        assert sum(target in text.split() for text in texts) > 1  # in interim results, too
        hidden = _run(
            _stream(calls, replace(streamed, masks_profanity=True), _pieces(content, 3_200))
        )
    assert [r.segment.alternatives[0].transcript for u in hidden for r in u.results] == [
        " ".join(masked if word == target else word for word in text.split()) for text in texts
    ]


def test_requests_that_cannot_be_served_are_refused_by_the_check(recogniser: Recogniser) -> None:
    refused: list[tuple[Request, str]] = [
        (Request(model="nobody"), "no model 'nobody'; this server has 'en-small'"),
        (Request(language="fr"), "'fr' is not served"),
        (Request(decoder="reference"), "reference is not there"),
        (Request(phrases=(Phrase("?", 1.0),)), "has no word"),
        (Request(decoder="rescored", search_tokens="phones"), "leave search_tokens out"),
    ]
    with _calls(recogniser) as calls:
        _run(calls.check(Request(model="en-small", language="en-GB", decoder="greedy")))
        _run(calls.check(Request(search_tokens="phones", phrases=(Phrase("voxgate", 5.0),))))
        for request, message in refused:
            with pytest.raises(InputError, match=message.replace("?", r"\?")):
                _run(calls.check(request))
            with pytest.raises(InputError):
                _run(calls.recognise(request, bytes(32_000)))


def test_request_that_names_no_decoder_gets_the_one_given_or_the_most_accurate(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    assert recogniser.best_decoder == "rescored"
    texts = []
    choices: tuple[tuple[DecoderName | None, DecoderName], ...] = (
        ("beam", "beam"),
        (None, "rescored"),
    )
    for named, expected in choices:
        with _calls(recogniser, decoder=named) as calls:
            found = _run(calls.recognise(Request(audio=PCM), to_pcm(waveforms[0])))
        segments = [segment for _, segment in found.segments]
        assert segments == recogniser.recognise(_heard(waveforms[0]), decoder=expected)
        texts.append(_texts(segments))
    assert texts[0] != texts[1]


def test_search_tokens_choose_the_head_that_a_beam_search_reads(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    heard = _heard(waveforms[2])
    expected = {
        "phones": recogniser.recognise(heard, decoder="beam-phones"),
        "characters": recogniser.recognise(heard, decoder="beam-characters"),
    }
    assert expected["phones"] != expected["characters"]
    with _calls(recogniser) as calls:
        for tokens, segments in expected.items():
            request = Request(audio=PCM, search_tokens=tokens)  # type: ignore[arg-type]  # one of two
            found = _run(calls.recognise(request, to_pcm(waveforms[2])))
            assert [segment for _, segment in found.segments] == segments
