"""How many streams a server carries, and how late its results are.

The load comes from processes of its own, each with one event loop; what is sent is made before the
clock starts. At the pace of speech every result has a message that made it possible: the one that
completed its window, or its endpoint. Which one that is depends on the audio alone, so a session in
this process finds it beforehand; the lag of a result is the time from when that message was due to
the result's arrival. The look-ahead of the profile and the silence that ends an utterance have
passed by then: what is left is the server.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle
from multiprocessing.connection import Connection, wait
from typing import Any, Final, Literal

import grpc
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from service.audio import AudioFormat, Encoding, load_audio, to_pcm
from service.bundle import DEFAULT_PROFILE
from service.errors import ManifestError, ServerError
from service.manifest import Utterance
from service.pb.voxgate.v1 import speech_pb2 as pb
from service.pb.voxgate.v1 import speech_pb2_grpc
from service.processors import count_usable_processors
from service.recogniser import DecoderName, FloatArray, Recogniser
from service.request import StreamRequest
from service.session import OFFLINE_PROFILE, Session

Pace = Literal["realtime", "fast", "offline"]
"""Streams as fast as speech, streams as fast as they are taken, or whole recordings."""
OnProgress = Callable[[str, float, float], object]
"""Told what is done, how far it is, and how far it goes."""

PIECE_S: Final = 0.1
INTERIM: Final = "interim results"
FINAL: Final = "final results"
LAST: Final = "final results after half-close"
REQUEST: Final = "requests"

_SAMPLE_RATE: Final = 16_000
_PIECE_SAMPLES: Final = round(PIECE_S * _SAMPLE_RATE)
_PAUSE_S: Final = 0.8
_PAUSE_LEVEL: Final = 10 ** (-70 / 20)  # of full scale, as the noise of a quiet room
_EXPECTED_AUDIO_S: Final = 800.0  # audio that is read beforehand
_FEWEST_AUDIOS, _MOST_AUDIOS = 8, 32
_MOST_RECORDINGS: Final = 64
_WARM_UP: Final = 0.25  # of the time that is measured
_STAGGER_S: Final = 1.0
_LEAD_S: Final = 1.0  # from the order to begin to the first message
_OPENING_S: Final = 0.2  # from the opening of a stream to its first message
_DRAIN_S: Final[dict[Pace, float]] = {  # for results after the last message
    "realtime": 15.0,
    "fast": 600.0,  # flow control lets minutes of audio wait in the server
    "offline": 60.0,
}
_CONNECT_S: Final = 10.0
_REFUSED_S: Final = 0.1  # until a refused request is tried again
_BEAT_S: Final = 0.02
_TICK_S: Final = 0.2
_STREAMS_PER_CHANNEL: Final = 16
_LATE_MS: Final = 20.0
_FINAL_TOLERANCE_S: Final = 0.2
_INTERIM_TOLERANCE_S: Final = 0.021  # half an output frame of 40 ms, the longest
_BATCH_SIZES: Final = (1, 2, 4, 8)
_STEPPING_S: Final = 1.0
_MOST_STREAMS: Final = 1 << 16
_SPEECH: Final = pb.DESCRIPTOR.services_by_name["Speech"].full_name


@dataclass(frozen=True)
class Target:
    """The server, what is asked of it, and by how many."""

    address: str
    """`host:port`."""
    api_key: str = ""
    """Sent with every call, unless it is empty."""
    decoder: DecoderName | None = None
    """None takes the server's default."""
    profile: str = DEFAULT_PROFILE
    n_clients: int = 1
    """Processes that send."""
    server_pid: int | None = None
    """The server, where its load is wanted."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Sent with every call."""
        return (("x-api-key", self.api_key),) if self.api_key else ()


@dataclass(frozen=True)
class Expected:
    """A response that a stream should get."""

    message: int
    """Index of the message that makes it possible; behind the last one, the half-close."""
    end_s: float
    """`result_end_time` of its last result."""
    is_final: bool


@dataclass(frozen=True)
class Latencies:
    """How late results were, milliseconds."""

    n: int
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True)
class Plan:
    """What a client process sends."""

    address: str
    metadata: tuple[tuple[str, str], ...]
    pace: Pace
    seconds: float
    """How long to send; at the pace of speech the audio is as long."""
    opening: bytes = b""
    """The first request of every stream, serialised."""
    messages: tuple[tuple[bytes, ...], ...] = ()
    """The other requests, serialised; stream i sends those with index i, modulo their number."""
    recordings: tuple[tuple[float, bytes], ...] = ()
    """Seconds of audio and the serialised request with it."""


@dataclass
class StreamLog:
    """What happened to one stream, or to one client that sends recordings; monotonic times."""

    number: int
    start: float
    end: float = 0.0
    audio_s: float = 0.0
    """Audio sent, or for recordings: recognised."""
    lateness_s: list[float] = field(default_factory=list)
    """How long after it was due each message was sent."""
    heard: list[tuple[float, float, bool]] = field(default_factory=list)
    """Arrival, end of the last result, and whether it is final, of each response with results."""
    taken_s: list[float] = field(default_factory=list)
    """How long each recording took."""
    codes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class ClientLog:
    """What one client process tells of a trial."""

    streams: list[StreamLog]
    beat_s: list[float]
    """How late its event loop was, now and then."""
    cpu_s: float


@dataclass(frozen=True)
class Report:
    """The figures of one trial."""

    pace: Pace
    n_streams: int
    audio_s: float
    wall_s: float
    codes: dict[str, int]
    """Streams, or requests, by the name of their gRPC status."""
    latencies: dict[str, Latencies | None]
    """By what is timed; None where there was none."""
    n_expected: int = 0
    n_missing: int = 0
    """Expected responses that did not come."""
    n_unmatched: int = 0
    """Responses that were not expected; they are not timed."""
    send_lateness_p95_ms: float | None = None
    loop_lateness_p95_ms: float | None = None
    client_cpu: float = 0.0
    """Processors that the client processes kept busy."""
    server_cpu: float | None = None
    """Processors that the server kept busy, after the warm-up."""
    server_memory_mb: float | None = None

    @property
    def throughput(self) -> float:
        """Seconds of audio in a second."""
        return self.audio_s / self.wall_s

    @property
    def n_errors(self) -> int:
        """Streams or requests that did not end well."""
        return sum(n for code, n in self.codes.items() if code != "OK")

    @property
    def n_failed(self) -> int:
        """Those that were not refused for want of capacity."""
        return self.n_errors - self.codes.get("RESOURCE_EXHAUSTED", 0)

    def holds(self, bound_ms: float) -> bool:
        """Whether no stream failed and the 95th percentile of final results is in bounds."""
        final = self.latencies.get(FINAL)
        return self.n_errors == 0 and final is not None and final.p95_ms <= bound_ms

    def as_json(self) -> dict[str, Any]:
        """The figures as an object."""
        return {**asdict(self), "throughput": self.throughput}


@dataclass(frozen=True)
class Capacity:
    """How many streams a server carries."""

    n_streams: int
    """The most that held; 0 if not even one did."""
    bound_ms: float
    """What the 95th percentile of final results may be."""
    trials: tuple[Report, ...]
    model_streams: float
    """Streams whose windows this machine's processors could read if nothing else were done."""

    @property
    def n_failed(self) -> int:
        """Streams that failed; those that were refused or cut off for being late are no failure."""
        return sum(t.n_failed - t.codes.get("DEADLINE_EXCEEDED", 0) for t in self.trials)

    def as_json(self) -> dict[str, Any]:
        """The figures as an object."""
        return {**asdict(self), "trials": [trial.as_json() for trial in self.trials]}


def join_audio(
    utterances: Sequence[Utterance], *, n_audios: int, seconds: float
) -> list[tuple[bytes, ...]]:
    """Join utterances with pauses of faint noise; each audio begins with another utterance.

    Args:
        utterances: what is said, in a rotating order.
        n_audios: how many audios to make.
        seconds: length of each, rounded to whole messages.

    Returns:
        The PCM of each audio in pieces of `PIECE_S`.

    Raises:
        AudioError: a recording cannot be read.
        ManifestError: there is no utterance.
    """
    if not utterances:
        raise ManifestError("the manifest lists no recording; there is nothing to send")
    n_pieces = max(1, round(seconds / PIECE_S))
    audios = []
    for number in range(n_audios):
        first = number * len(utterances) // n_audios
        rotated = [*utterances[first:], *utterances[:first]]
        pcm = to_pcm(_join(rotated, n_samples=n_pieces * _PIECE_SAMPLES, seed=number))
        size = len(pcm) // n_pieces
        audios.append(tuple(pcm[start : start + size] for start in range(0, len(pcm), size)))
    return audios


def _join(utterances: Sequence[Utterance], *, n_samples: int, seed: int) -> FloatArray:
    draw = np.random.default_rng(seed)
    parts: list[FloatArray] = []
    for utterance in cycle(utterances):
        pause = draw.normal(0, _PAUSE_LEVEL, round(_PAUSE_S * _SAMPLE_RATE))
        parts.append(load_audio(utterance.audio_path, target_rate=_SAMPLE_RATE))
        parts.append(pause.astype(np.float32))
        if sum(map(len, parts)) >= n_samples:
            break
    return np.concatenate(parts)[:n_samples]


def expect(
    recogniser: Recogniser, pieces: Sequence[bytes], *, decoder: DecoderName, profile: str
) -> list[Expected]:
    """Find the message after which each response of a stream can be given.

    The decoder must be the one that the server uses: where it reads no word there is no response,
    and some interim results end where the last committed word does.

    Args:
        recogniser: the bundle that the server serves.
        pieces: the PCM of each message.
        decoder: the one asked for.
        profile: the one asked for.

    Raises:
        RequestError: there is no such profile or decoder.
    """
    request = StreamRequest(
        audio=AudioFormat(encoding=Encoding.LINEAR16, sample_rate=_SAMPLE_RATE),
        profile=profile,
        interim_results=True,
    )
    session = Session(recogniser, request, decoder=decoder)
    said = [(i, update) for i, piece in enumerate(pieces) for update in session.push(piece)]
    said += [(len(pieces), update) for update in session.finish()]
    return [
        Expected(message, last.segment.end_s, is_final=last.is_final)
        for message, update in said
        for last in update.results[-1:]
    ]


def match(
    heard_s: Sequence[float], expected_s: Sequence[float], *, tolerance_s: float
) -> list[int | None]:
    """For each end time heard, the index of the one expected, in order; None where there is none.

    Args:
        heard_s: end times as they came.
        expected_s: end times as they should have come.
        tolerance_s: how far two may be apart.
    """
    found: list[int | None] = []
    following = 0
    for end_s in heard_s:
        near = [
            k
            for k in range(following, len(expected_s))
            if abs(expected_s[k] - end_s) <= tolerance_s
        ]
        nearest = min(near, key=lambda k: abs(expected_s[k] - end_s), default=None)
        found.append(nearest)
        following = following if nearest is None else nearest + 1
    return found


def summarise(lags_s: Sequence[float]) -> Latencies | None:
    """Percentiles of lags in seconds; None of nothing."""
    if not lags_s:
        return None
    values_ms = 1000 * np.asarray(lags_s)
    return Latencies(len(lags_s), *np.percentile(values_ms, [50, 90, 95, 99, 100]).tolist())


def find_capacity(holds: Callable[[int], bool], *, first: int = 8) -> int:
    """The largest number of streams that holds, to within 5 %.

    Args:
        holds: tries a number of streams.
        first: the first number tried; it is doubled until one does not hold.

    Returns:
        A number that held, or 0.
    """
    most, fewest_failing = 0, first
    while fewest_failing < _MOST_STREAMS and holds(fewest_failing):
        most, fewest_failing = fewest_failing, 2 * fewest_failing
    while fewest_failing - most > max(1, most // 20):
        middle = (most + fewest_failing) // 2
        if holds(middle):
            most = middle
        else:
            fewest_failing = middle
    return most


def count_model_streams(recogniser: Recogniser, profile: str) -> float:
    """Streams whose windows the processors could read in time if nothing else were to be done.

    Windows run on one thread, at the batch size that is best.
    """
    settings = recogniser.profiles[DEFAULT_PROFILE if profile == OFFLINE_PROFILE else profile]
    shape = (settings.window_feature_frames, recogniser.features.n_mels)
    windows = np.random.default_rng(0).normal(size=(max(_BATCH_SIZES), *shape)).astype(np.float32)
    best_s = min(
        _time_step(recogniser, windows[:size], settings.chunk_frames) / size
        for size in _BATCH_SIZES
    )
    return count_usable_processors() * settings.chunk_frames * recogniser.frame_s / best_s


def _time_step(recogniser: Recogniser, windows: FloatArray, n_chunk_frames: int) -> float:
    """Seconds that reading a batch of windows takes, (batch, time, mel): the median."""
    engine = recogniser.streaming_engine
    lengths = np.full(len(windows), windows.shape[1])
    state = engine.initial_state(len(windows))
    taken: list[float] = []
    stop = time.perf_counter() + _STEPPING_S
    while time.perf_counter() < stop or not taken:
        began = time.perf_counter()
        _, _, state = engine.step(windows, lengths, n_chunk_frames=n_chunk_frames, state=state)
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


class StreamTest:
    """Streams at the pace of speech: what they say, and what should come back."""

    def __init__(
        self,
        target: Target,
        recogniser: Recogniser,
        utterances: Sequence[Utterance],
        *,
        seconds: float,
        most_streams: int = _MOST_STREAMS,
        on_progress: OnProgress,
    ) -> None:
        """Make what is sent, and find what should come back.

        Args:
            target: the server.
            recogniser: the bundle that it serves.
            utterances: what is said.
            seconds: how long to measure; a quarter of it comes before, as warm-up.
            most_streams: there will be no more than that.
            on_progress: told of the preparation.

        Raises:
            InputError: a recording cannot be read, or there is no such profile or decoder.
            ServerError: the server cannot be reached or serves another model.
        """
        _check_server(target, model=recogniser.name)
        self._target = target
        self._warm_up_s = _WARM_UP * seconds
        self._length_s = seconds + self._warm_up_s
        n_audios = max(_FEWEST_AUDIOS, round(_EXPECTED_AUDIO_S / self._length_s))
        n_audios = min(n_audios, most_streams, _MOST_AUDIOS)
        on_progress("reading the manifest", 0, n_audios)
        audios = join_audio(utterances, n_audios=n_audios, seconds=self._length_s)
        self._n_messages = len(audios[0])
        decoder = target.decoder or recogniser.best_decoder
        find = partial(expect, recogniser, decoder=decoder, profile=target.profile)
        self._expected: list[list[Expected]] = []
        with ThreadPoolExecutor(count_usable_processors()) as executor:
            for expected in executor.map(find, audios):
                self._expected.append(expected)
                on_progress("finding what should be heard", len(self._expected), n_audios)
        self.plan = Plan(
            address=target.address,
            metadata=target.metadata,
            pace="realtime",
            seconds=self._length_s,
            opening=_opening(target, recogniser.name),
            messages=_messages(audios),
        )

    def run(self, clients: Clients, n_streams: int, *, on_progress: OnProgress) -> Report:
        """Try a number of streams.

        Raises:
            ServerError: a client process ended, or there is no server process of that id.
        """
        server = _ServerProcess(
            self._target.server_pid, after_s=self._warm_up_s, before_s=self._length_s
        )

        def tick(passed_s: float) -> None:
            server.look(passed_s)
            on_progress(f"{n_streams} streams", min(passed_s, self._length_s), self._length_s)

        logs = clients.run(n_streams, on_tick=tick)
        streams = [stream for log in logs for stream in log.streams]
        return Report(
            pace="realtime",
            n_streams=n_streams,
            **_totals(logs),
            **self._time(streams),
            send_lateness_p95_ms=_p95_ms(late for s in streams for late in s.lateness_s),
            loop_lateness_p95_ms=_p95_ms(late for log in logs for late in log.beat_s),
            server_cpu=server.n_busy,
            server_memory_mb=server.memory_mb,
        )

    def _time(self, logs: Iterable[StreamLog]) -> dict[str, Any]:
        """The figures of a report that depend on what was expected."""
        lags_s: dict[str, list[float]] = {INTERIM: [], FINAL: [], LAST: []}
        n_expected = n_heard = n_matched = 0
        for log in logs:
            expected = self._expected[log.number % len(self._expected)]
            n_expected += len(expected)
            n_heard += len(log.heard)
            for found, arrival in pair(log, expected):
                n_matched += 1
                if found.message * PIECE_S < self._warm_up_s:
                    continue
                name = FINAL if found.is_final else INTERIM
                name = LAST if found.message == self._n_messages else name
                lags_s[name].append(arrival - log.start - found.message * PIECE_S)
        return {
            "latencies": {name: summarise(values) for name, values in lags_s.items()},
            "n_expected": n_expected,
            "n_missing": n_expected - n_matched,
            "n_unmatched": n_heard - n_matched,
        }


def pair(log: StreamLog, expected: Sequence[Expected]) -> Iterator[tuple[Expected, float]]:
    """What was expected of a stream and came, each with its arrival."""
    for is_final, tolerance_s in ((False, _INTERIM_TOLERANCE_S), (True, _FINAL_TOLERANCE_S)):
        wanted = [e for e in expected if e.is_final == is_final]
        heard = [(arrival, end_s) for arrival, end_s, final in log.heard if final == is_final]
        found = match([e for _, e in heard], [e.end_s for e in wanted], tolerance_s=tolerance_s)
        for (arrival, _), k in zip(heard, found, strict=True):
            # what came before its message was due is something else
            if k is not None and arrival >= log.start + wanted[k].message * PIECE_S:
                yield wanted[k], arrival


def measure_streams(
    target: Target,
    recogniser: Recogniser,
    utterances: Sequence[Utterance],
    *,
    n_streams: int,
    seconds: float,
    on_progress: OnProgress,
) -> Report:
    """Time the results of a number of streams; see `StreamTest` for arguments and errors."""
    test = StreamTest(
        target,
        recogniser,
        utterances,
        seconds=seconds,
        most_streams=n_streams,
        on_progress=on_progress,
    )
    with open_clients(test.plan, target.n_clients) as clients:
        return test.run(clients, n_streams, on_progress=on_progress)


def search_capacity(
    target: Target,
    recogniser: Recogniser,
    utterances: Sequence[Utterance],
    *,
    first: int,
    bound_ms: float,
    seconds: float,
    n_tries: int = 1,
    on_trial: Callable[[Report], object],
    on_progress: OnProgress,
) -> Capacity:
    """Look for the most streams whose final results are in time.

    Args:
        target: the server.
        recogniser: the bundle that it serves.
        utterances: what is said.
        first: streams of the first trial.
        bound_ms: what the 95th percentile of the lag of final results may be.
        seconds: how long each trial is measured.
        n_tries: trials of a number of streams, until one is in time: on a machine that others
            slow down now and then, a single one says little.
        on_trial: told of every trial.
        on_progress: told how far the preparation is, or a trial.

    Raises:
        InputError, ServerError: see `StreamTest`.
    """
    on_progress("timing the model", 0, 1)
    model_streams = count_model_streams(recogniser, target.profile)
    test = StreamTest(target, recogniser, utterances, seconds=seconds, on_progress=on_progress)
    trials: list[Report] = []

    def holds(n_streams: int) -> bool:
        for _ in range(n_tries):
            trials.append(test.run(clients, n_streams, on_progress=on_progress))
            on_trial(trials[-1])
            if trials[-1].holds(bound_ms):
                return True
        return False

    with open_clients(test.plan, target.n_clients) as clients:
        n_streams = find_capacity(holds, first=first)
    return Capacity(n_streams, bound_ms, tuple(trials), model_streams)


def measure_throughput(
    target: Target,
    utterances: Sequence[Utterance],
    *,
    pace: Pace,
    n_streams: int,
    seconds: float,
    on_progress: OnProgress,
) -> Report:
    """Send as fast as the server takes it: streams, or recordings one after another.

    Args:
        target: the server.
        utterances: what is said.
        pace: `fast` or `offline`.
        n_streams: streams, or clients that send a recording when they have the one before.
        seconds: how long to send.
        on_progress: told how far it is.

    Raises:
        InputError: a recording cannot be read.
        ServerError: the server cannot be reached.
    """
    model = _check_server(target)
    on_progress("reading the manifest", 0, 1)
    is_offline = pace == "offline"
    n_audios = 0 if is_offline else min(n_streams, _FEWEST_AUDIOS)
    plan = Plan(
        address=target.address,
        metadata=target.metadata,
        pace=pace,
        seconds=seconds,
        opening=_opening(target, model),
        messages=_messages(join_audio(utterances, n_audios=n_audios, seconds=seconds)),
        recordings=_recordings(target, utterances, model) if is_offline else (),
    )
    server = _ServerProcess(target.server_pid, after_s=_STAGGER_S, before_s=seconds)

    def tick(passed_s: float) -> None:
        server.look(passed_s)
        on_progress(f"{n_streams} clients", min(passed_s, seconds), seconds)

    with open_clients(plan, target.n_clients) as clients:
        logs = clients.run(n_streams, on_tick=tick)
    taken_s = [taken for log in logs for stream in log.streams for taken in stream.taken_s]
    return Report(
        pace=pace,
        n_streams=n_streams,
        **_totals(logs),
        latencies={REQUEST: summarise(taken_s)} if is_offline else {},
        server_cpu=server.n_busy,
        server_memory_mb=server.memory_mb,
    )


def _p95_ms(lags_s: Iterable[float]) -> float | None:
    latencies = summarise(list(lags_s))
    return None if latencies is None else latencies.p95_ms


def _totals(logs: Sequence[ClientLog]) -> dict[str, Any]:
    """The figures that every report has."""
    streams = [stream for log in logs for stream in log.streams]
    wall_s = max(s.end for s in streams) - min(s.start for s in streams)
    return {
        "audio_s": round(sum(stream.audio_s for stream in streams), 3),
        "wall_s": wall_s,
        "codes": dict(sum((stream.codes for stream in streams), Counter[str]())),
        "client_cpu": sum(log.cpu_s for log in logs) / wall_s,
    }


def _check_server(target: Target, *, model: str | None = None) -> str:
    """The name of the server's first model.

    Raises:
        ServerError: it does not answer, or does not serve the model that is wanted.
    """
    with grpc.insecure_channel(target.address) as channel:
        stub = speech_pb2_grpc.SpeechStub(channel)
        try:
            response = stub.ListModels(
                pb.ListModelsRequest(), timeout=_CONNECT_S, metadata=target.metadata
            )
        except grpc.RpcError as error:
            raise ServerError(
                f"no list of models from {target.address} "
                f"({error.code().name}: {error.details()}); start a server with `voxgate serve`"
            ) from error
    names = [str(m.name) for m in response.models]
    if not names or (model is not None and model not in names):
        raise ServerError(
            f"the server at {target.address} has {', '.join(names) or 'no model'}, expected "
            f"{model or 'any'}; name the bundle that it serves with --bundle"
        )
    return names[0]


def _config(target: Target, model: str) -> pb.RecognitionConfig:
    kind, _, search_tokens = (target.decoder or "").upper().partition("-")
    return pb.RecognitionConfig(
        encoding=pb.RecognitionConfig.LINEAR16,
        sample_rate_hertz=_SAMPLE_RATE,
        model=model,
        decoder=kind or None,
        search_tokens=search_tokens or None,
    )


def _opening(target: Target, model: str) -> bytes:
    streaming = pb.StreamingRecognitionConfig(
        config=_config(target, model), interim_results=True, profile=target.profile
    )
    request = pb.StreamingRecognizeRequest(streaming_config=streaming)
    return bytes(request.SerializeToString())


def _messages(audios: Iterable[Sequence[bytes]]) -> tuple[tuple[bytes, ...], ...]:
    return tuple(
        tuple(
            pb.StreamingRecognizeRequest(audio_content=piece).SerializeToString()
            for piece in pieces
        )
        for pieces in audios
    )


def _recordings(
    target: Target, utterances: Sequence[Utterance], model: str
) -> tuple[tuple[float, bytes], ...]:
    """Some of the recordings, from all parts of the manifest."""
    if not utterances:
        raise ManifestError("the manifest lists no recording; there is nothing to send")
    recordings = []
    for utterance in utterances[:: -(-len(utterances) // _MOST_RECORDINGS)]:
        waveform = load_audio(utterance.audio_path, target_rate=_SAMPLE_RATE)
        audio = pb.RecognitionAudio(content=to_pcm(waveform))
        request = pb.RecognizeRequest(config=_config(target, model), audio=audio)
        recordings.append((len(waveform) / _SAMPLE_RATE, request.SerializeToString()))
    return tuple(recordings)


class _ServerProcess:
    """The load of the server's process between two times of a trial."""

    def __init__(self, pid: int | None, *, after_s: float, before_s: float) -> None:
        try:
            self._process = None if pid is None else psutil.Process(pid)
        except psutil.NoSuchProcess as error:
            raise ServerError(
                f"there is no process {pid}; --server-pid names the server"
            ) from error
        self._after_s = after_s
        self._before_s = before_s
        self._first: tuple[float, float] | None = None
        self.n_busy: float | None = None
        self.memory_mb: float | None = None

    def look(self, passed_s: float) -> None:
        if self._process is None or not self._after_s <= passed_s <= self._before_s:
            return
        with suppress(psutil.NoSuchProcess):  # the streams' statuses say so
            times = self._process.cpu_times()
            spent_s = times.user + times.system
            if self._first is None:
                self._first = (passed_s, spent_s)
                return
            began_s, before_s = self._first
            self.n_busy = (spent_s - before_s) / (passed_s - began_s)
            self.memory_mb = self._process.memory_info().rss / 1e6


class Clients:
    """Processes that send."""

    def __init__(self, connections: Sequence[Connection[Any, Any]]) -> None:
        self._connections = connections

    def run(self, n_streams: int, *, on_tick: Callable[[float], object]) -> list[ClientLog]:
        """Let all of them send, and wait for what they tell.

        Args:
            n_streams: streams of all of them together.
            on_tick: told now and then how many seconds have passed since the beginning.

        Raises:
            ServerError: a process has ended.
        """
        begin = time.monotonic() + _LEAD_S
        waiting = list(self._connections)
        for number, connection in enumerate(waiting):
            numbers = range(number, n_streams, len(waiting))
            connection.send((list(numbers), n_streams, begin))
        logs: list[ClientLog] = []
        while waiting:
            wait(waiting, timeout=_TICK_S)
            for connection in [c for c in waiting if c.poll()]:
                logs.append(_receive(connection))
                waiting.remove(connection)
            on_tick(max(0.0, time.monotonic() - begin))
        return logs


def _receive(connection: Connection[Any, Any]) -> Any:  # noqa: ANN401  # what the other end sends
    try:
        return connection.recv()
    except EOFError as error:
        raise ServerError("a client process ended; its message is above") from error


@contextmanager
def open_clients(plan: Plan, n_clients: int) -> Iterator[Clients]:
    """Start processes that send what a plan says; end them when they are not needed any more."""
    context = multiprocessing.get_context("spawn")  # gRPC does not outlive a fork
    pipes = [context.Pipe() for _ in range(n_clients)]
    processes = [
        context.Process(target=_run_client, args=(theirs, plan), daemon=True) for _, theirs in pipes
    ]
    try:
        for process, (ours, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()
            ours.recv()  # it is ready
        yield Clients([ours for ours, _ in pipes])
    finally:
        for process, (ours, _) in zip(processes, pipes, strict=True):
            ours.close()
            if process.pid is not None:
                process.terminate()
                process.join()


def _run_client(connection: Connection[Any, Any], plan: Plan) -> None:
    """Send whenever told to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    connection.send("ready")
    while True:
        try:
            numbers, n_streams, begin = connection.recv()
        except EOFError:
            return
        gc.collect()
        gc.disable()  # a collection would make messages late
        log = asyncio.run(_drive(plan, numbers, n_streams=n_streams, begin=begin))
        gc.enable()
        connection.send(log)


async def _drive(plan: Plan, numbers: Sequence[int], *, n_streams: int, begin: float) -> ClientLog:
    """Run some of the streams of a trial."""
    channels = [
        grpc.aio.insecure_channel(plan.address, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(0, len(numbers), _STREAMS_PER_CHANNEL)
    ]
    client = _recognise if plan.pace == "offline" else _stream
    cpu_s = time.process_time()
    beats: list[float] = []
    beat = asyncio.create_task(_beat(beats))
    try:
        streams = await asyncio.gather(
            *(
                client(
                    channels[place // _STREAMS_PER_CHANNEL],
                    plan,
                    StreamLog(number, start=begin + _STAGGER_S * number / n_streams),
                )
                for place, number in enumerate(numbers)
            )
        )
    finally:
        beat.cancel()
        for channel in channels:
            await channel.close()
    return ClientLog(streams, beats, time.process_time() - cpu_s)


async def _beat(beats: list[float]) -> None:
    """Note how late this event loop is."""
    while True:
        due = time.monotonic() + _BEAT_S
        await asyncio.sleep(_BEAT_S)
        beats.append(max(0.0, time.monotonic() - due))


async def _sleep_until(due: float) -> None:
    remaining_s = due - time.monotonic()
    if remaining_s > 0:
        await asyncio.sleep(remaining_s)


async def _stream(channel: grpc.aio.Channel, plan: Plan, log: StreamLog) -> StreamLog:
    """Run one stream to its end."""
    method = channel.stream_stream(f"/{_SPEECH}/StreamingRecognize")  # bytes in, bytes out
    received: list[tuple[float, bytes]] = []
    await _sleep_until(log.start - _OPENING_S)
    timeout_s = log.start + plan.seconds + _DRAIN_S[plan.pace] - time.monotonic()
    call = method(metadata=plan.metadata, timeout=timeout_s)
    sender = asyncio.create_task(_send(call, plan, log))
    try:
        async for response in call:
            received.append((time.monotonic(), response))  # noqa: PERF401  # errors come between
    except grpc.aio.AioRpcError:
        pass  # its code is counted below
    finally:
        sender.cancel()
        await asyncio.gather(sender, return_exceptions=True)
    log.end = time.monotonic()
    log.codes[(await call.code()).name] += 1
    for arrival, data in received:
        results = pb.StreamingRecognizeResponse.FromString(data).results
        if results:
            end_s = results[-1].result_end_time.ToMilliseconds() / 1000
            log.heard.append((arrival, end_s, results[-1].is_final))
    return log


async def _send(call: grpc.aio.StreamStreamCall, plan: Plan, log: StreamLog) -> None:
    """Send the messages of one stream when they are due, or as fast as they are taken."""
    messages = plan.messages[log.number % len(plan.messages)]
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the stream has ended
        await call.write(plan.opening)
        if plan.pace == "realtime":
            for number, message in enumerate(messages):
                due = log.start + number * PIECE_S
                await _sleep_until(due)
                log.lateness_s.append(time.monotonic() - due)
                await call.write(message)
                log.audio_s += PIECE_S
            await _sleep_until(log.start + len(messages) * PIECE_S)
        else:
            await _sleep_until(log.start)
            for message in cycle(messages):
                await call.write(message)
                log.audio_s += PIECE_S
                if time.monotonic() >= log.start + plan.seconds:
                    break
        await call.done_writing()


async def _recognise(channel: grpc.aio.Channel, plan: Plan, log: StreamLog) -> StreamLog:
    """Send recordings one after another."""
    method = channel.unary_unary(f"/{_SPEECH}/Recognize")
    first = log.number % len(plan.recordings)
    await _sleep_until(log.start)
    for audio_s, request in cycle([*plan.recordings[first:], *plan.recordings[:first]]):
        began = time.monotonic()
        if began >= log.start + plan.seconds:
            break
        try:
            await method(
                request, metadata=plan.metadata, timeout=plan.seconds + _DRAIN_S[plan.pace]
            )
        except grpc.aio.AioRpcError as error:
            log.codes[error.code().name] += 1
            await asyncio.sleep(_REFUSED_S)
        else:
            log.codes["OK"] += 1
            log.audio_s += audio_s
            log.taken_s.append(time.monotonic() - began)
    log.end = time.monotonic()
    return log


def print_figures(figures: Report | Capacity, console: Console) -> None:
    """Print what was measured."""
    if isinstance(figures, Capacity):
        _print_capacity(figures, console)
    else:
        _print_report(figures, console)


def _print_report(report: Report, console: Console) -> None:
    if report.latencies:
        table = Table("ms", "n", "p50", "p90", "p95", "p99", "max")
        for name, latencies in report.latencies.items():
            table.add_row(name, *_cells(latencies))
        console.print(table)
    what = "clients" if report.pace == "offline" else "streams"
    console.print(
        f"{report.n_streams} {what}, {report.audio_s:.0f} s of audio in {report.wall_s:.1f} s: "
        f"{report.throughput:.1f} × real time"
    )
    console.print("status: " + ", ".join(f"{n} {code}" for code, n in report.codes.items()))
    if report.n_expected:
        console.print(
            f"responses: {report.n_expected} expected, {report.n_missing} missing "
            f"({report.n_missing / report.n_expected:.1%}), {report.n_unmatched} others"
        )
    console.print(f"the clients kept {report.client_cpu:.2f} processors busy")
    if report.server_cpu is not None and report.server_memory_mb is not None:
        console.print(
            f"the server kept {report.server_cpu:.2f} processors busy; resident memory "
            f"{report.server_memory_mb:.0f} MB"
        )
    if report.send_lateness_p95_ms is not None and report.loop_lateness_p95_ms is not None:
        console.print(
            f"messages were sent up to {report.send_lateness_p95_ms:.1f} ms late (95 %), the "
            f"clients' event loops were {report.loop_lateness_p95_ms:.1f} ms late"
        )
        console.print(_warning(report), style="yellow", end="")


def _warning(report: Report) -> str:
    """What kept the messages from being sent in time, as a line; empty if they were."""
    if (report.send_lateness_p95_ms or 0.0) <= _LATE_MS:
        return ""
    if (report.loop_lateness_p95_ms or 0.0) > _LATE_MS:
        return "warning: this tool was the limit, not the server; try more --clients\n"
    return "warning: messages were late because the server did not take them in time\n"


def describe_trial(report: Report, bound_ms: float) -> str:
    """A trial of a search in one line."""
    final = report.latencies.get(FINAL)
    lag = "no final results" if final is None else f"final results p95 {final.p95_ms:.0f} ms"
    verdict = "holds" if report.holds(bound_ms) else "too many"
    server = "" if report.server_cpu is None else f", server {report.server_cpu:.2f} processors"
    return (
        f"{report.n_streams} streams: {verdict}; {lag}, {report.n_errors} errors{server}"
        f"\n{_warning(report)}".rstrip()
    )


def _print_capacity(capacity: Capacity, console: Console) -> None:
    table = Table("streams", "", "interim p50", "p95", "final p50", "p95", "p99", "errors")
    for trial in sorted(capacity.trials, key=lambda t: t.n_streams):
        interim, final = (_cells(trial.latencies.get(name)) for name in (INTERIM, FINAL))
        verdict = "holds" if trial.holds(capacity.bound_ms) else "too many"
        table.add_row(
            f"{trial.n_streams}",
            verdict,
            *(interim[1], interim[3]),
            *(final[1], final[3], final[4]),
            f"{trial.n_errors}",
        )
    console.print(table)
    console.print(
        f"capacity: {capacity.n_streams} streams with final results within "
        f"{capacity.bound_ms:.0f} ms (95 %)"
    )
    console.print(
        f"the acoustic model's windows alone would allow {capacity.model_streams:.0f} streams on "
        f"this machine"
    )


def _cells(latencies: Latencies | None) -> list[str]:
    if latencies is None:
        return ["0", *"-----"]
    n, *values_ms = asdict(latencies).values()
    return [f"{n}", *(f"{value:.0f}" for value in values_ms)]
