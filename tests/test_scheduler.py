"""Turns at the acoustic model: what a request gets is its own, whoever else is served."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from service.decoding.hypothesis import Hypothesis, Phrase
from service.engine import FloatArray, StreamState
from service.errors import RequestError, ServerError
from service.features import log_mel
from service.recogniser import DecoderName, Recogniser
from service.scheduler import (
    BUCKET_FRAMES,
    BatchSettings,
    Priority,
    Scheduler,
    default_batches,
)

N_MELS = 3
PATIENCE_S = 20.0


class MarkingEngine:
    """Gives back what it got, times three, plus the utterance's length; notes every batch."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        """First value of each row, by batch."""
        self.spells: list[bool] = []
        self.lengths: list[list[int]] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.n_begun = 0
        self.fails_on: float | None = None

    def log_probs(
        self,
        features: FloatArray,
        feature_lengths: npt.NDArray[np.int64],
        *,
        spell: bool = True,
    ) -> FloatArray:
        self.n_begun += 1
        self.spells.append(spell)
        assert self.may_go_on.wait(PATIENCE_S)
        self.batches.append(features[:, 0, 0].tolist())
        self.lengths.append(feature_lengths.tolist())
        if self.fails_on in features[:, 0, 0]:
            raise ServerError("the engine broke down")
        return features * np.float32(3) + feature_lengths[:, None, None].astype(np.float32)


class MarkingStreamingEngine:
    """Adds the sum of all windows before to what it got; notes every batch."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.shapes: list[tuple[int, int]] = []
        """Chunk and window of each batch."""
        self.spells: list[bool] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.n_begun = 0

    def initial_state(self, batch_size: int = 1) -> StreamState:
        return StreamState(
            np.zeros((batch_size, 1, N_MELS), np.float32),
            np.zeros((batch_size, 1, 1, 1), np.float32),
            np.zeros((batch_size, 1, 1, 2), np.float32),
            np.zeros((batch_size, 0), np.float32),
        )

    def step(
        self,
        features: FloatArray,
        feature_lengths: npt.NDArray[np.int64],
        *,
        n_chunk_frames: int,
        state: StreamState,
        spell: bool = True,
    ) -> tuple[FloatArray, npt.NDArray[np.int64], StreamState]:
        self.n_begun += 1
        self.spells.append(spell)
        assert self.may_go_on.wait(PATIENCE_S)
        self.batches.append(features[:, 0, 0].tolist())
        self.shapes.append((n_chunk_frames, features.shape[1]))
        after = StreamState(
            features[:, -1:],
            state.convolved + 1,
            state.recurrent + features.sum(axis=(1, 2))[:, None, None, None],
            state.spelling,
        )
        return features + state.recurrent[:, 0, :, :1], feature_lengths - n_chunk_frames, after


@contextmanager
def _open(
    engine: MarkingEngine | None = None,
    streaming_engine: MarkingStreamingEngine | None = None,
    *,
    observe: Callable[[str, int, float], object] = lambda *_: None,
    **settings: Any,
) -> Iterator[Scheduler]:
    scheduler = Scheduler(
        engine or MarkingEngine(),
        streaming_engine or MarkingStreamingEngine(),
        BatchSettings(**settings),
        observe=observe,
    )
    try:
        yield scheduler
    finally:
        for blocked in (engine, streaming_engine):
            if blocked is not None:
                blocked.may_go_on.set()
        scheduler.close()


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def _has_waiting(scheduler: Scheduler, n: int) -> bool:
    return sum(map(len, scheduler._waiting.values())) == n


def _utterance(n_frames: int, first: float = 1.0) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    features = np.random.default_rng(n_frames).normal(size=(1, n_frames, N_MELS))
    features[0, 0, 0] = first
    return features.astype(np.float32), np.array([n_frames])


def _submit(
    scheduler: Scheduler, first: float, *, n_frames: int = 8, priority: Priority = "offline"
) -> Future[Any]:
    inputs = (*_utterance(n_frames, first), True)
    return scheduler.submit("utterance", n_frames // BUCKET_FRAMES, inputs, priority)


def _submit_window(
    scheduler: Scheduler, first: float, *, n_chunk: int = 2, n_frames: int = 4, spell: bool = True
) -> Future[Any]:
    features, lengths = _utterance(n_frames, first)
    state = MarkingStreamingEngine().initial_state()
    inputs = (features, lengths, n_chunk, state, spell)
    return scheduler.submit("window", (n_chunk, n_frames, spell), inputs, "live")


def _run_together(works: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run works on threads of their own that begin at the same moment."""
    start = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> Any:
        start.wait(PATIENCE_S)
        return work()

    with ThreadPoolExecutor(len(works)) as threads:
        return list(threads.map(run, works))


# --- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_threads", [1, 8])
@pytest.mark.parametrize("n_lanes", [1, 3])
def test_utterances_get_what_the_engine_gives_each_alone(n_lanes: int, n_threads: int) -> None:
    with _open(n_lanes=n_lanes, most_utterances=4) as scheduler:
        inputs = [
            [_utterance(1 + (37 * thread + 11 * i) % 450, float(thread)) for i in range(20)]
            for thread in range(n_threads)
        ]

        def ask(thread: int) -> list[FloatArray]:
            engine = scheduler.engine("live" if thread % 2 else "offline")
            return [engine.log_probs(*utterance) for utterance in inputs[thread]]

        found = _run_together([partial(ask, thread) for thread in range(n_threads)])
    alone = MarkingEngine()
    for mine, utterances in zip(found, inputs, strict=True):
        for log_probs, (features, lengths) in zip(mine, utterances, strict=True):
            n_frames = int(lengths[0])
            assert np.array_equal(log_probs[:, :n_frames], alone.log_probs(features, lengths))


def test_utterances_of_one_call_come_back_in_order() -> None:
    lengths = np.array([450, 10, 220, 11])
    features = np.random.default_rng(0).normal(size=(4, 450, N_MELS)).astype(np.float32)
    expected = MarkingEngine().log_probs(features, lengths)
    with _open(n_lanes=2, most_utterances=2) as scheduler:
        found = scheduler.engine("offline").log_probs(features, lengths)
    assert found.shape == expected.shape
    for row, n_frames in enumerate(lengths):
        assert np.array_equal(found[row, :n_frames], expected[row, :n_frames])


@pytest.mark.parametrize("n_threads", [1, 8])
@pytest.mark.parametrize("n_lanes", [1, 3])
def test_windows_and_states_are_what_the_engine_gives_each_stream_alone(
    n_lanes: int, n_threads: int
) -> None:
    def read(engine: Any, thread: int) -> list[FloatArray]:
        state = engine.initial_state()
        found = []
        for i in range(20):
            features, lengths = _utterance(4 + thread % 2, float(100 * thread + i))
            log_probs, n_frames, state = engine.step(
                features, lengths, n_chunk_frames=2, state=state
            )
            found += [log_probs, n_frames, *state]
        return found

    with _open(n_lanes=n_lanes) as scheduler:
        engine = scheduler.streaming_engine("live")
        streams = [partial(read, engine, thread) for thread in range(n_threads)]
        found = _run_together(streams)
    for thread, mine in enumerate(found):
        expected = read(MarkingStreamingEngine(), thread)
        assert all(np.array_equal(a, b) for a, b in zip(mine, expected, strict=True))


def test_windows_of_real_streams_are_what_each_gives_alone(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    """int8 scales are those of a batch, so they differ a little from those of a window alone."""
    profile = recogniser.profiles["balanced"]
    n_window = profile.window_feature_frames
    n_step = profile.chunk_frames * recogniser.subsampling
    features = [log_mel(waveform, recogniser.features) for waveform in waveforms[:6]]
    sizes: list[int] = []

    def read(engine: Any, stream: int) -> FloatArray:
        state = engine.initial_state()
        found = []
        for i in range(4):
            window = features[stream][None, i * n_step : i * n_step + n_window]
            log_probs, n_frames, state = engine.step(
                window, np.array([n_window]), n_chunk_frames=profile.chunk_frames, state=state
            )
            found.append(log_probs[0, : int(n_frames[0])])
        return np.concatenate(found)

    scheduler = Scheduler(
        recogniser.engine,
        recogniser.streaming_engine,
        BatchSettings(most_windows=4),
        observe=lambda _kind, size, _wait_s: sizes.append(size),
    )
    engine = scheduler.streaming_engine("live")
    found = _run_together([partial(read, engine, stream) for stream in range(6)])
    scheduler.close()
    assert max(sizes) > 1
    alone = [read(recogniser.streaming_engine, stream) for stream in range(6)]
    together, alone_probs = np.exp(np.concatenate(found)), np.exp(np.concatenate(alone))
    assert np.abs(together - alone_probs).mean() < 2e-3
    assert (together.argmax(axis=1) == alone_probs.argmax(axis=1)).mean() > 0.97
    others = np.exp(np.concatenate(alone[1:] + alone[:1]))
    assert np.abs(together - others).mean() > 1e-2  # so the bound above means something


# --- batches -------------------------------------------------------------------------------------


def test_batches_hold_inputs_of_one_length_class_and_as_many_as_allowed() -> None:
    engine = MarkingEngine()
    engine.may_go_on.clear()
    with _open(engine, most_utterances=3) as scheduler:
        jobs = [_submit(scheduler, 0.0)]
        _wait_for(lambda: engine.n_begun == 1)
        lengths = [10, 210, 20, 399, 400, 30, 199, 200, 40]
        jobs += [_submit(scheduler, float(i), n_frames=n) for i, n in enumerate(lengths, start=1)]
        engine.may_go_on.set()
        for job in jobs:
            job.result(PATIENCE_S)
    buckets = [{n // BUCKET_FRAMES for n in batch} for batch in engine.lengths]
    assert all(len(bucket) == 1 for bucket in buckets)
    assert engine.batches == [[0], [1, 3, 6], [2, 4, 8], [5], [7, 9]]


def test_batches_of_windows_have_one_shape_and_as_many_as_allowed() -> None:
    streaming = MarkingStreamingEngine()
    streaming.may_go_on.clear()
    with _open(streaming_engine=streaming, most_windows=2) as scheduler:
        jobs = [_submit_window(scheduler, 0.0)]
        _wait_for(lambda: streaming.n_begun == 1)
        shapes = [(2, 4), (2, 5), (3, 4), (2, 4), (2, 4), (2, 5)]
        jobs += [
            _submit_window(scheduler, float(i), n_chunk=chunk, n_frames=n)
            for i, (chunk, n) in enumerate(shapes, start=1)
        ]
        streaming.may_go_on.set()
        for job in jobs:
            job.result(PATIENCE_S)
    assert streaming.batches == [[0], [1, 4], [2, 6], [3], [5]]
    assert streaming.shapes == [(2, 4), (2, 4), (2, 5), (3, 4), (2, 4)]


def test_work_that_spells_shares_no_batch_with_work_that_does_not() -> None:
    engine, streaming = MarkingEngine(), MarkingStreamingEngine()
    features, lengths = _utterance(8, 1.0)

    def read(scheduler: Scheduler, *, spell: bool) -> None:
        scheduler.engine("live").log_probs(features, lengths, spell=spell)
        turns = scheduler.streaming_engine("live")
        state = turns.initial_state()
        turns.step(features, lengths, n_chunk_frames=2, state=state, spell=spell)

    with _open(engine, streaming, longest_wait_s=0.05) as scheduler:
        _run_together([partial(read, scheduler, spell=spell) for spell in (True, False)])
    assert sorted(engine.spells) == sorted(streaming.spells) == [False, True]
    assert [len(batch) for batch in (*engine.batches, *streaming.batches)] == [1] * 4


def test_windows_and_utterances_never_share_a_batch() -> None:
    engine, streaming = MarkingEngine(), MarkingStreamingEngine()
    engine.may_go_on.clear()
    seen: list[tuple[str, int]] = []
    with _open(
        engine,
        streaming,
        most_windows=8,
        most_utterances=8,
        observe=lambda kind, size, _: seen.append((kind, size)),
    ) as scheduler:
        jobs = [_submit(scheduler, 0.0)]
        _wait_for(lambda: engine.n_begun == 1)
        for i in range(3):
            jobs.append(_submit(scheduler, float(i), priority="live"))
            jobs.append(_submit_window(scheduler, float(i)))
        engine.may_go_on.set()
        for job in jobs:
            job.result(PATIENCE_S)
    assert seen == [("utterance", 1), ("utterance", 3), ("window", 3)]


@pytest.mark.parametrize("longest_wait_s", [0.0, 0.02])
def test_batches_under_load_are_never_larger_than_allowed(longest_wait_s: float) -> None:
    sizes: list[tuple[str, int]] = []
    with (
        _open(
            n_lanes=3,
            most_windows=4,
            most_utterances=2,
            longest_wait_s=longest_wait_s,
            observe=lambda kind, size, _: sizes.append((kind, size)),
        ) as scheduler,
        scheduler.stream(),
        scheduler.stream(),
    ):
        jobs = [
            _submit_window(scheduler, float(i)) if i % 2 else _submit(scheduler, float(i))
            for i in range(101)
        ]
        for job in jobs:
            job.result(PATIENCE_S)
    most = {"window": 4, "utterance": 2}
    assert all(1 <= size <= most[kind] for kind, size in sizes)
    assert sum(size for _, size in sizes) == 101


# --- turns ---------------------------------------------------------------------------------------


def test_live_work_goes_before_offline_work_that_came_first() -> None:
    engine = MarkingEngine()
    engine.may_go_on.clear()
    with _open(engine) as scheduler:
        jobs = [_submit(scheduler, 0.0)]
        _wait_for(lambda: engine.n_begun == 1)
        jobs += [_submit(scheduler, float(i)) for i in (1, 2)]
        jobs += [_submit(scheduler, float(i), priority="live") for i in (3, 4)]
        engine.may_go_on.set()
        for job in jobs:
            job.result(PATIENCE_S)
    assert list(chain(*engine.batches)) == [0, 3, 4, 1, 2]


def test_open_stream_keeps_one_of_two_lanes_from_offline_work() -> None:
    engine, streaming = MarkingEngine(), MarkingStreamingEngine()
    engine.may_go_on.clear()
    with _open(engine, streaming, n_lanes=2) as scheduler:
        with scheduler.stream():
            jobs = [_submit(scheduler, float(i)) for i in range(3)]
            _wait_for(lambda: engine.n_begun == 1)
            for i in range(5):  # live work is done all the while
                _submit_window(scheduler, float(i)).result(PATIENCE_S)
            assert engine.n_begun == 1
        _wait_for(lambda: engine.n_begun == 2)  # without a stream, both lanes serve recordings
        engine.may_go_on.set()
        for job in jobs:
            job.result(PATIENCE_S)
    assert sorted(chain(*engine.batches)) == [0, 1, 2]


def test_recordings_use_every_lane_when_no_stream_is_open() -> None:
    engine = MarkingEngine()
    engine.may_go_on.clear()
    with _open(engine, n_lanes=3) as scheduler:
        for i in range(4):
            _submit(scheduler, float(i))
        _wait_for(lambda: engine.n_begun == 3)


def test_offline_work_proceeds_on_one_lane_while_a_stream_is_open() -> None:
    engine = MarkingEngine()
    with _open(engine, n_lanes=1) as scheduler, scheduler.stream():
        for i in range(3):
            job = _submit(scheduler, float(i))
            job.result(PATIENCE_S)
    assert engine.batches == [[0], [1], [2]]


# --- waiting for more ----------------------------------------------------------------------------


def test_batch_waits_until_it_is_full() -> None:
    streaming = MarkingStreamingEngine()
    with (
        _open(streaming_engine=streaming, most_windows=3, longest_wait_s=60.0) as scheduler,
        scheduler.stream(),
        scheduler.stream(),
    ):
        jobs = [_submit_window(scheduler, float(i)) for i in range(2)]
        assert not wait(jobs, timeout=0.05).done
        jobs.append(_submit_window(scheduler, 2.0))
        for job in jobs:
            job.result(PATIENCE_S)
    assert streaming.batches == [[0, 1, 2]]


def test_batch_that_does_not_fill_is_run_when_the_wait_is_over() -> None:
    waits_s: list[float] = []
    with (
        _open(
            most_windows=3,
            longest_wait_s=0.05,
            observe=lambda _kind, _size, wait_s: waits_s.append(wait_s),
        ) as scheduler,
        scheduler.stream(),
        scheduler.stream(),
    ):
        _submit_window(scheduler, 0.0).result(PATIENCE_S)
    assert waits_s[0] >= 0.05


def test_window_of_the_only_stream_does_not_wait() -> None:
    with (
        _open(most_windows=3, longest_wait_s=600.0) as scheduler,
        scheduler.stream(),
    ):
        _submit_window(scheduler, 0.0).result(PATIENCE_S)


# --- searches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["greedy", "beam"])
def test_decoder_behind_turns_gives_what_it_gives_alone(
    recogniser: Recogniser, waveforms: list[FloatArray], name: DecoderName
) -> None:
    emission = recogniser.emission(log_mel(waveforms[1], recogniser.features))
    emission = emission[:, recogniser.columns(name)]
    phrases = (Phrase("mac connell", 5.0),)
    alone = recogniser.decoder(name)
    kinds: list[str] = []
    with _open(n_lanes=2, observe=lambda kind, *_: kinds.append(kind)) as scheduler:
        decoder = scheduler.decoder(alone, "live")
        expected = alone.decode(emission, n_best=3, phrases=phrases)
        assert decoder.decode(emission, n_best=3, phrases=phrases) == expected
        assert kinds == ["search"]
        search, search_alone = decoder.open(phrases=phrases), alone.open(phrases=phrases)
        assert (search is None) == (search_alone is None)
        if search is None or search_alone is None:
            return
        middle = len(emission) // 2
        assert search.read(emission, n_settled=middle) == search_alone.read(
            emission, n_settled=middle
        )
        assert search.n_shared_words() == search_alone.n_shared_words()


class OrderedDecoder:
    """Notes by whose wish it searches; knows nothing."""

    def __init__(self, name: str, order: list[str]) -> None:
        self._name = name
        self._order = order

    def decode(
        self, emission: FloatArray, *, n_best: int = 1, phrases: Sequence[Phrase] = ()
    ) -> list[Hypothesis]:
        del emission, n_best, phrases
        self._order.append(self._name)
        if self._name == "broken":
            raise RequestError("there is nothing to search")
        return []

    def open(self, *, phrases: Sequence[Phrase] = ()) -> None:
        raise NotImplementedError


def test_searches_take_turns_one_by_one_live_first_and_fail_alone() -> None:
    engine = MarkingEngine()
    engine.may_go_on.clear()
    order: list[str] = []
    emission = np.zeros((1, 1), np.float32)
    ways: list[tuple[str, Priority]] = [("one", "offline"), ("two", "live"), ("broken", "live")]
    with _open(engine, most_utterances=8) as scheduler, ThreadPoolExecutor(3) as threads:
        _submit(scheduler, 0.0)
        _wait_for(lambda: engine.n_begun == 1)
        found = []
        for n_waiting, (name, priority) in enumerate(ways, start=1):
            decoder = scheduler.decoder(OrderedDecoder(name, order), priority)
            found.append(threads.submit(decoder.decode, emission))
            _wait_for(partial(_has_waiting, scheduler, n_waiting))
        assert order == []
        engine.may_go_on.set()
        assert [job.result(PATIENCE_S) for job in found[:2]] == [[], []]
        with pytest.raises(RequestError, match="nothing to search"):
            found[2].result(PATIENCE_S)
    assert order == ["two", "broken", "one"]


# --- errors, the end, what is told ---------------------------------------------------------------


def test_error_reaches_the_requests_of_its_batch_alone() -> None:
    engine = MarkingEngine()
    engine.may_go_on.clear()
    engine.fails_on = 2.0
    with _open(engine, most_utterances=2) as scheduler:
        first = _submit(scheduler, 0.0)
        _wait_for(lambda: engine.n_begun == 1)
        jobs = [_submit(scheduler, float(i)) for i in range(1, 7)]
        engine.may_go_on.set()
        first.result(PATIENCE_S)
        for job in jobs[:2]:
            with pytest.raises(ServerError, match="broke down"):
                job.result(PATIENCE_S)
        for i, job in enumerate(jobs[2:], start=3):
            assert job.result(PATIENCE_S)[0, 0, 0] == 3 * i + 8
        assert engine.batches == [[0], [1, 2], [3, 4], [5, 6]]
        features, lengths = _utterance(8, 2.0)
        with pytest.raises(ServerError, match="broke down"):
            scheduler.engine("live").log_probs(features, lengths)


@pytest.mark.parametrize("n_lanes", [1, 3])
def test_close_lets_waiting_work_finish_and_ends_the_lanes(n_lanes: int) -> None:
    engine = MarkingEngine()
    engine.may_go_on.clear()
    with _open(engine, n_lanes=n_lanes) as scheduler, scheduler.stream():
        jobs = [_submit(scheduler, float(i)) for i in range(6)]
        _wait_for(lambda: engine.n_begun >= 1)
        closing = threading.Thread(target=scheduler.close)
        closing.start()
        _wait_for(lambda: scheduler._is_closed)
        assert not any(job.done() for job in jobs)
        engine.may_go_on.set()
        closing.join(PATIENCE_S)
        assert all(job.done() for job in jobs)
        assert not any(lane.is_alive() for lane in scheduler._lanes)
    assert sorted(chain(*engine.batches)) == list(range(6))


def test_observer_is_told_kind_size_and_wait_of_each_batch() -> None:
    engine = MarkingEngine()
    engine.may_go_on.clear()
    seen: list[tuple[str, int, float]] = []
    with _open(engine, most_windows=4, observe=lambda *batch: seen.append(batch)) as scheduler:
        jobs = [_submit(scheduler, 0.0)]
        _wait_for(lambda: engine.n_begun == 1)
        jobs += [_submit_window(scheduler, float(i)) for i in range(2)]
        time.sleep(0.03)
        engine.may_go_on.set()
        for job in jobs:
            job.result(PATIENCE_S)
    assert [(kind, size) for kind, size, _ in seen] == [("utterance", 1), ("window", 2)]
    assert 0 <= seen[0][2] < PATIENCE_S
    assert 0.03 <= seen[1][2] < PATIENCE_S


def test_provider_decides_what_is_run_at_once() -> None:
    cpu = default_batches("cpu", n_threads=3)
    assert cpu == BatchSettings(n_lanes=3, most_windows=1, most_utterances=1)
    cuda = default_batches("cuda", n_threads=3, longest_wait_s=0.01)
    assert cuda.n_lanes == 1
    assert cuda.longest_wait_s == 0.01
    assert cuda.most_windows > cpu.most_windows
    assert cuda.most_utterances > cpu.most_utterances
    said = default_batches("cuda", n_threads=1, most_windows=7, most_utterances=5)
    assert (said.most_windows, said.most_utterances) == (7, 5)
