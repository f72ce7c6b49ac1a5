"""Which heavy work is done next: the acoustic model's windows and utterances, and searches.

Requests call an engine or a decoder as if each had it to itself; in a fiber others go on until the
result is there. The inputs wait in two queues, live before offline; lanes, one thread each, take
what fits into one batch. An offline batch cannot be interrupted, so while streams are open one lane
is left to them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from service.decoding.hypothesis import Decoder, Hypothesis, Phrase, Search
from service.engine import AcousticEngine, FloatArray, Provider, StreamingEngine, StreamState
from service.fibers import wait_for

Priority = Literal["live", "offline"]
Kind = Literal["window", "utterance", "search"]
Observe = Callable[[Kind, int, float], object]
"""Told of each batch: its kind, its size, and the seconds its first input waited."""

BUCKET_FRAMES: Final = 200
"""Utterances whose lengths differ by less may share a batch."""
_PRIORITIES: Final[tuple[Priority, ...]] = ("live", "offline")


@dataclass(frozen=True)
class BatchSettings:
    """How much is run at once."""

    n_lanes: int = 1
    """Batches that run at the same time, one thread each."""
    most_windows: int = 1
    """Windows of streams in a batch."""
    most_utterances: int = 1
    """Utterances in a batch."""
    longest_wait_s: float = 0.0
    """How long a batch that is not full waits for more, while several streams are open."""


def default_batches(
    provider: Provider,
    *,
    n_threads: int,
    most_windows: int | None = None,
    most_utterances: int | None = None,
    longest_wait_s: float = 0.0,
) -> BatchSettings:
    """What suits a provider, where the caller does not say.

    On a processor everything runs alone: a batch of utterances gains nothing and one of windows
    little, and an int8 graph takes the scale of its activations from the whole batch, so that now
    and then a stream's text would depend on its neighbours. A GPU runs one large batch at a time.
    """
    is_cpu = provider == "cpu"
    return BatchSettings(
        n_lanes=n_threads if is_cpu else 1,
        most_windows=most_windows or (1 if is_cpu else 64),
        most_utterances=most_utterances or (1 if is_cpu else 16),
        longest_wait_s=longest_wait_s,
    )


@dataclass
class _Job:
    kind: Kind
    bucket: Hashable
    """Only inputs of equal kind and bucket share a batch."""
    inputs: tuple[Any, ...]
    arrival: float = field(default_factory=time.monotonic)
    output: Future[Any] = field(default_factory=Future)


class Scheduler:
    """Runs one model's graphs for many threads. Close it when no request uses it any more."""

    def __init__(
        self,
        engine: AcousticEngine,
        streaming_engine: StreamingEngine,
        settings: BatchSettings,
        *,
        observe: Observe = lambda *_: None,
    ) -> None:
        self._engine = engine
        self._streaming_engine = streaming_engine
        self._settings = settings
        self._observe = observe
        self._changed = threading.Condition()
        self._waiting: dict[Priority, deque[_Job]] = {name: deque() for name in _PRIORITIES}
        self._n_offline = 0  # lanes busy with offline work
        self._n_streams = 0
        self._is_closed = False
        self._runners: dict[Kind, Callable[[list[tuple[Any, ...]]], Sequence[Any]]] = {
            "window": self._run_windows,
            "utterance": self._run_utterances,
            "search": lambda inputs: [work() for (work,) in inputs],
        }
        self._lanes = [
            threading.Thread(target=self._work, name=f"lane-{i}", daemon=True)
            for i in range(settings.n_lanes)
        ]
        for lane in self._lanes:
            lane.start()

    def engine(self, priority: Priority) -> AcousticEngine:
        """An engine whose utterances take their turn here."""
        return _TurnEngine(self, self._engine, priority)

    def streaming_engine(self, priority: Priority) -> StreamingEngine:
        """An engine whose windows take their turn here."""
        return _TurnStreamingEngine(self, self._streaming_engine, priority)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """While it is open, offline work leaves a lane free."""
        with self._changed:
            self._n_streams += 1
        try:
            yield
        finally:
            with self._changed:
                self._n_streams -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """End the lanes when what waits is done."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for lane in self._lanes:
            lane.join()

    def decoder(self, decoder: Decoder, priority: Priority) -> Decoder:
        """A decoder whose searches take their turn here."""
        return _TurnDecoder(self, decoder, priority)

    def submit(
        self, kind: Kind, bucket: Hashable, inputs: tuple[Any, ...], priority: Priority
    ) -> Future[Any]:
        """Put an input into its queue; the future gets its output, or what its batch raised."""
        job = _Job(kind, bucket, inputs)
        with self._changed:
            assert not self._is_closed, "the model was closed under a request"
            self._waiting[priority].append(job)
            self._changed.notify()
        return job.output

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            priority, batch = taken
            run = self._runners[batch[0].kind]
            try:
                self._observe(batch[0].kind, len(batch), time.monotonic() - batch[0].arrival)
                outputs = run([job.inputs for job in batch])
            except BaseException as error:  # noqa: BLE001  # it belongs to the requests
                for job in batch:
                    job.output.set_exception(error)
            else:
                for job, output in zip(batch, outputs, strict=True):
                    job.output.set_result(output)
            if priority == "offline":
                with self._changed:
                    self._n_offline -= 1
                    self._changed.notify()

    def _take(self) -> tuple[Priority, list[_Job]] | None:
        """The next batch; None when there will be no more."""
        with self._changed:
            while True:
                priority = self._next_priority()
                if priority is None:
                    if self._is_closed and not any(self._waiting.values()):
                        self._changed.notify_all()
                        return None
                    self._changed.wait()
                    continue
                batch, wait_s = self._choose(priority)
                if not batch:
                    self._changed.wait(wait_s)
                    continue
                for job in batch:
                    self._waiting[priority].remove(job)
                self._n_offline += priority == "offline"
                if any(self._waiting.values()):
                    self._changed.notify()  # a lane whose wait has just timed out was told of it
                return priority, batch

    def _next_priority(self) -> Priority | None:
        if self._waiting["live"]:
            return "live"
        n_reserved = 1 if self._n_streams else 0
        n_allowed = max(1, self._settings.n_lanes - n_reserved)
        return "offline" if self._waiting["offline"] and self._n_offline < n_allowed else None

    def _choose(self, priority: Priority) -> tuple[list[_Job], float]:
        """The first batch that is full or has waited enough; else none, and how long to wait."""
        now = time.monotonic()
        least_s = self._settings.longest_wait_s
        seen: set[tuple[Kind, Hashable]] = set()
        for first in self._waiting[priority]:
            if (first.kind, first.bucket) in seen:
                continue
            seen.add((first.kind, first.bucket))
            batch = self._fitting(priority, first)
            wait_s = first.arrival + self._settings.longest_wait_s - now
            if len(batch) == self._most(first) or wait_s <= 0 or self._n_streams <= 1:
                return batch, 0.0
            least_s = min(least_s, wait_s)
        return [], least_s

    def _fitting(self, priority: Priority, first: _Job) -> list[_Job]:
        fitting = (
            job
            for job in self._waiting[priority]
            if job.kind == first.kind and job.bucket == first.bucket
        )
        return [job for job, _ in zip(fitting, range(self._most(first)), strict=False)]

    def _most(self, job: _Job) -> int:
        settings = self._settings
        most = {"window": settings.most_windows, "utterance": settings.most_utterances}
        return most.get(job.kind, 1)

    def _run_windows(self, inputs: Sequence[tuple[Any, ...]]) -> Sequence[Any]:
        """Run windows of the same shape: inputs are features, length, chunk, state, spell."""
        features, lengths, chunks, states, spells = zip(*inputs, strict=True)
        if len(inputs) == 1:
            return [
                self._streaming_engine.step(
                    features[0],
                    lengths[0],
                    n_chunk_frames=chunks[0],
                    state=states[0],
                    spell=spells[0],
                )
            ]
        state = StreamState(*(np.concatenate(parts) for parts in zip(*states, strict=True)))
        log_probs, n_frames, after = self._streaming_engine.step(
            np.concatenate(features),
            np.concatenate(lengths),
            n_chunk_frames=chunks[0],
            state=state,
            spell=spells[0],
        )
        rows = [slice(i, i + 1) for i in range(len(inputs))]
        return [
            (log_probs[row], n_frames[row], StreamState(*(part[row] for part in after)))
            for row in rows
        ]

    def _run_utterances(self, inputs: Sequence[tuple[Any, ...]]) -> Sequence[Any]:
        """Run utterances of similar length: inputs are features, length, spell."""
        all_features, all_lengths, spells = zip(*inputs, strict=True)
        if len(inputs) == 1:
            return [self._engine.log_probs(all_features[0], all_lengths[0], spell=spells[0])]
        lengths = np.concatenate(all_lengths)
        batch = np.zeros((len(inputs), lengths.max(), all_features[0].shape[2]), np.float32)
        for row, features in enumerate(all_features):
            batch[row, : features.shape[1]] = features[0]
        log_probs = self._engine.log_probs(batch, lengths, spell=spells[0])
        return [log_probs[i : i + 1] for i in range(len(inputs))]


class _TurnEngine:
    def __init__(self, scheduler: Scheduler, engine: AcousticEngine, priority: Priority) -> None:
        self._scheduler = scheduler
        self._engine = engine
        self._priority = priority

    def log_probs(
        self,
        features: FloatArray,
        feature_lengths: npt.NDArray[np.int64],
        *,
        spell: bool = True,
    ) -> FloatArray:
        """Compute the log_probs of utterances, each in its turn; see `AcousticEngine`."""
        outputs = [
            self._scheduler.submit(
                "utterance",
                (int(n_frames) // BUCKET_FRAMES, spell),
                (features[i : i + 1, :n_frames], feature_lengths[i : i + 1], spell),
                self._priority,
            )
            for i, n_frames in enumerate(feature_lengths)
        ]
        rows = [wait_for(output) for output in outputs]
        if len(rows) == 1:
            found: FloatArray = rows[0]
            return found
        n_frames = max(row.shape[1] for row in rows)
        log_probs = np.zeros((len(rows), n_frames, rows[0].shape[2]), np.float32)
        for i, row in enumerate(rows):
            log_probs[i, : row.shape[1]] = row[0]
        return log_probs


class _TurnStreamingEngine:
    def __init__(self, scheduler: Scheduler, engine: StreamingEngine, priority: Priority) -> None:
        self._scheduler = scheduler
        self._engine = engine
        self._priority = priority

    def initial_state(self, batch_size: int = 1) -> StreamState:
        """The state at the start of `batch_size` streams: zeros."""
        return self._engine.initial_state(batch_size)

    def step(
        self,
        features: FloatArray,
        feature_lengths: npt.NDArray[np.int64],
        *,
        n_chunk_frames: int,
        state: StreamState,
        spell: bool = True,
    ) -> tuple[FloatArray, npt.NDArray[np.int64], StreamState]:
        """Read one window in its turn; see `StreamingEngine`."""
        assert len(features) == 1, "streams read their windows one by one"
        output = self._scheduler.submit(
            "window",
            (n_chunk_frames, features.shape[1], spell),
            (features, feature_lengths, n_chunk_frames, state, spell),
            self._priority,
        )
        found: tuple[FloatArray, npt.NDArray[np.int64], StreamState] = wait_for(output)
        return found


class _TurnDecoder:
    def __init__(self, scheduler: Scheduler, decoder: Decoder, priority: Priority) -> None:
        self._scheduler = scheduler
        self._decoder = decoder
        self._priority = priority

    def decode(
        self, emission: FloatArray, *, n_best: int = 1, phrases: Sequence[Phrase] = ()
    ) -> list[Hypothesis]:
        """Search in its turn; see `Decoder`."""
        work = partial(self._decoder.decode, emission, n_best=n_best, phrases=phrases)
        found: list[Hypothesis] = self._run(work)
        return found

    def open(self, *, phrases: Sequence[Phrase] = ()) -> Search | None:
        """Begin a search whose steps take their turn; see `Decoder`."""
        search = self._decoder.open(phrases=phrases)
        return None if search is None else _TurnSearch(self._run, search)

    def _run(self, work: Callable[[], Any]) -> Any:  # noqa: ANN401  # of the work
        return wait_for(self._scheduler.submit("search", id(work), (work,), self._priority))


class _TurnSearch:
    def __init__(self, run: Callable[[Callable[[], Any]], Any], search: Search) -> None:
        self._run = run
        self._search = search

    def read(self, log_probs: FloatArray, *, n_settled: int) -> Hypothesis:
        """Read the next frames in its turn; see `Search`."""
        found: Hypothesis = self._run(partial(self._search.read, log_probs, n_settled=n_settled))
        return found

    def n_shared_words(self) -> int:
        """How many words every reading begins with; see `Search`."""
        return self._search.n_shared_words()
