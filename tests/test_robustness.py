"""What a server survives: clients that vanish, that flood it or say nothing, and its own end."""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import soundfile
from conftest import RunningServer, _wait_for_address, join_with_pauses, noise, run_server
from google.longrunning import operations_pb2, operations_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.audio import to_pcm
from service.client import check_health
from service.pb.google.cloud.speech.v1 import cloud_speech_pb2 as google
from service.pb.google.cloud.speech.v1 import cloud_speech_pb2_grpc
from service.pb.voxgate.v1 import speech_pb2 as pb
from service.pb.voxgate.v1 import speech_pb2_grpc
from service.recogniser import FloatArray

_MIB = 1 << 20
_PIECE_BYTES = 3_200  # 0.1 s
_IDLE_S = 1.5


def _config(**fields: object) -> pb.StreamingRecognizeRequest:
    config = pb.RecognitionConfig(encoding=pb.RecognitionConfig.LINEAR16, **fields)  # type: ignore[arg-type]  # test shorthand
    streaming = pb.StreamingRecognitionConfig(config=config)
    return pb.StreamingRecognizeRequest(streaming_config=streaming)


def _audio(pcm: bytes, piece_bytes: int = _PIECE_BYTES) -> Iterator[pb.StreamingRecognizeRequest]:
    for start in range(0, len(pcm), piece_bytes):
        yield pb.StreamingRecognizeRequest(audio_content=pcm[start : start + piece_bytes])


def _finals(responses: Iterable[pb.StreamingRecognizeResponse]) -> list[str]:
    return [
        result.alternatives[0].transcript
        for response in responses
        for result in response.results
        if result.is_final
    ]


def _stream(stub: speech_pb2_grpc.SpeechStub, pcm: bytes, **fields: object) -> list[str]:
    """The final transcripts of a stream that is sent as fast as it is taken."""
    requests = [_config(**fields), *_audio(pcm, 10 * _PIECE_BYTES)]
    return _finals(stub.StreamingRecognize(iter(requests), timeout=60))


def _recording(pcm: bytes, **fields: object) -> pb.RecognizeRequest:
    config = _config(**fields).streaming_config.config
    return pb.RecognizeRequest(config=config, audio=pb.RecognitionAudio(content=pcm))


def _recognise(stub: speech_pb2_grpc.SpeechStub, pcm: bytes, **fields: object) -> list[str]:
    response = stub.Recognize(_recording(pcm, **fields), timeout=60)
    return [result.alternatives[0].transcript for result in response.results]


class _OpenStream:
    """A stream that is sent bit by bit."""

    def __init__(self, stub: speech_pb2_grpc.SpeechStub) -> None:
        self._requests: queue.SimpleQueue[pb.StreamingRecognizeRequest | None] = queue.SimpleQueue()
        self.call = stub.StreamingRecognize(iter(self._requests.get, None), timeout=60)

    def send(self, *requests: pb.StreamingRecognizeRequest) -> None:
        for request in requests:
            self._requests.put(request)

    def half_close(self) -> None:
        self._requests.put(None)

    def refusal(self) -> grpc.RpcError:
        """How the stream ends, without results."""
        with pytest.raises(grpc.RpcError) as caught:
            list(self.call)
        self.half_close()
        return caught.value


def _free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
        return port


def _wait_until(is_so: Callable[[], bool], *, seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@dataclass(frozen=True)
class _MeasuredServer:
    """A greedy server whose figures can be read."""

    server: RunningServer
    metrics_port: int

    @property
    def stub(self) -> speech_pb2_grpc.SpeechStub:
        return self.server.stub

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.server.process.pid)

    def resident_mb(self) -> float:
        return float(self.process.memory_info().rss / 1e6)

    def n_open(self, kind: str) -> int:
        address = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(address, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        name = f'voxgate_open_calls{{kind="{kind}"}} '
        (value,) = (line.removeprefix(name) for line in lines if line.startswith(name))
        return int(float(value))


@contextmanager
def _run_measured(*arguments: str) -> Iterator[_MeasuredServer]:
    port = _free_port()
    with run_server("--decoder", "greedy", "--metrics-port", str(port), *arguments) as server:
        yield _MeasuredServer(server, port)


@pytest.fixture(scope="module")
def measured() -> Iterator[_MeasuredServer]:
    with _run_measured() as server:
        yield server


@pytest.fixture(scope="module")
def limited() -> Iterator[_MeasuredServer]:
    with _run_measured("--max-streams", "2", "--idle-timeout", str(_IDLE_S)) as server:
        yield server


@pytest.fixture(scope="module")
def speech(waveforms: list[FloatArray]) -> FloatArray:
    """All clips, a pause behind each: 49 s."""
    return join_with_pauses(waveforms)


def _vanish(stub: speech_pb2_grpc.SpeechStub, pcm: bytes, *, seed: int) -> None:
    """Begin a call and cancel it at a random moment; every tenth is no stream."""
    draw = random.Random(seed)
    piece = pcm[: draw.randrange(0, len(pcm), 2)]
    if seed % 10 == 0:
        call = stub.Recognize.future(_recording(pcm), timeout=60)
        time.sleep(draw.uniform(0, 0.05))
        call.cancel()
        return
    stream = _OpenStream(stub)
    stream.send(_config(), *_audio(piece))
    time.sleep(draw.uniform(0, 0.05))
    if draw.random() < 0.3:
        stream.half_close()  # it may be ending when it is cancelled
    stream.call.cancel()
    stream.half_close()
    with contextlib.suppress(grpc.RpcError):
        list(stream.call)


def test_a_thousand_cancelled_streams_leave_nothing_behind(
    measured: _MeasuredServer, speech: FloatArray
) -> None:
    pcm = to_pcm(speech[: 16_000 * 4])
    expected = _stream(measured.stub, pcm)
    assert expected[0]

    def vanish(seeds: Iterable[int]) -> None:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda seed: _vanish(measured.stub, pcm, seed=seed), seeds))
        _wait_until(lambda: measured.n_open("stream") == measured.n_open("recording") == 0)

    with ThreadPoolExecutor(32) as threads:  # more at a time than later, so all threads are there
        for found in threads.map(lambda _: _stream(measured.stub, pcm), range(64)):
            assert found == expected
    vanish(range(200))
    n_threads, resident_mb = measured.process.num_threads(), measured.resident_mb()
    vanish(range(200, 1_000))
    assert measured.process.num_threads() <= n_threads + 4  # gRPC's own come and go
    assert measured.resident_mb() < resident_mb + 20
    assert _stream(measured.stub, pcm) == expected


def test_ten_minutes_at_full_speed_are_slowed_by_flow_control(
    measured: _MeasuredServer, speech: FloatArray
) -> None:
    minute = to_pcm(speech) + to_pcm(noise(60.0))
    minute = minute[: 60 * 32_000]
    _stream(measured.stub, minute)
    resident_mb = [measured.resident_mb()]
    has_ended = threading.Event()

    def watch() -> None:
        while not has_ended.wait(0.02):
            resident_mb.append(measured.resident_mb())

    start, sent_s = time.monotonic(), 0.0

    def requests() -> Iterator[pb.StreamingRecognizeRequest]:
        nonlocal sent_s
        yield _config()
        for _ in range(10):
            yield from _audio(minute, 64_000)
        sent_s = time.monotonic() - start

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        finals = _finals(measured.stub.StreamingRecognize(requests(), timeout=120))
        taken_s = time.monotonic() - start
    finally:
        has_ended.set()
        watcher.join()
    assert len(finals) >= 10 * 8
    assert sent_s > 0.4 * taken_s  # gRPC's window, which grows, holds the rest
    assert len(resident_mb) > 10
    assert max(resident_mb) < resident_mb[0] + 30


def test_message_beyond_the_limit_is_refused_and_the_server_goes_on(
    measured: _MeasuredServer, speech: FloatArray
) -> None:
    too_long = bytes(64 * _MIB)
    unlimited = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(measured.server.address, options=unlimited) as channel:
        stub = speech_pb2_grpc.SpeechStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Recognize(_recording(too_long), timeout=60)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(64 * _MIB) in str(caught.value.details())
        stream = _OpenStream(stub)
        stream.send(_config(), *_audio(too_long, len(too_long)))
        assert stream.refusal().code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        pcm = to_pcm(speech[: 16_000 * 7])
        assert _recognise(stub, pcm) == _recognise(measured.stub, pcm) != []


def _refusal(stub: speech_pb2_grpc.SpeechStub, request: pb.RecognizeRequest) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Recognize(request, timeout=10)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    return str(caught.value.details())


def test_refusal_of_a_long_name_fits_into_the_trailers(measured: _MeasuredServer) -> None:
    """Clients take 8 KiB of them, and non-ASCII characters are sent percent-encoded."""
    for name in ("x" * 100_000, "\u4e2d" * 100_000):
        details = _refusal(measured.stub, _recording(bytes(3_200), model=name))
        assert details.startswith(f"there is no model '{name[:100]}")
        assert details.endswith("this server has 'en-small'")
        assert len(details) <= 600


@pytest.mark.parametrize("decoder", [pb.RecognitionConfig.GREEDY, pb.RecognitionConfig.BEAM])
@pytest.mark.parametrize("phrase", ["z" * 200, "z" * 200_000, "9" * 5_000, "a b " * 50_000])
def test_phrase_that_would_take_minutes_to_spell_is_refused_at_once(
    measured: _MeasuredServer, decoder: int, phrase: str
) -> None:
    context = pb.SpeechContext(phrases=[phrase])
    request = _recording(bytes(3_200), decoder=decoder, speech_contexts=[context])
    assert "expected at most" in _refusal(measured.stub, request)


def test_page_token_of_any_length_is_an_empty_page(measured: _MeasuredServer) -> None:
    with grpc.insecure_channel(measured.server.address) as channel:
        stub = operations_pb2_grpc.OperationsStub(channel)
        for token in ("9" * 5_000, "\u0669" * 40, "-1", "no number"):
            request = operations_pb2.ListOperationsRequest(page_token=token)
            assert list(stub.ListOperations(request, timeout=10).operations) == []


def test_flac_that_does_not_say_its_length_is_read_to_its_end(
    measured: _MeasuredServer, speech: FloatArray
) -> None:
    """As encoders write it that cannot go back to the header."""
    buffer = io.BytesIO()
    soundfile.write(buffer, speech, 16_000, format="FLAC", subtype="PCM_16")
    told = buffer.getvalue()
    untold = told[:21] + bytes([told[21] & 0xF0, 0, 0, 0, 0]) + told[26:]  # samples, 36 bits
    expected, found = (
        measured.stub.Recognize(
            pb.RecognizeRequest(audio=pb.RecognitionAudio(content=content)), timeout=60
        )
        for content in (told, untold)
    )
    assert found == expected
    seconds = found.total_billed_time.ToMilliseconds() / 1000
    assert seconds == pytest.approx(len(speech) / 16_000, abs=0.1)


def test_stream_beyond_the_limit_is_refused_until_a_place_is_free(limited: _MeasuredServer) -> None:
    held = [_OpenStream(limited.stub) for _ in range(2)]
    for stream in held:
        stream.send(_config())
    _wait_until(lambda: limited.n_open("stream") == 2)
    third = _OpenStream(limited.stub)
    third.send(_config())
    start = time.monotonic()
    refusal: Any = third.refusal()
    assert time.monotonic() - start < 1.0
    assert refusal.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "2 streams" in refusal.details()
    trailing = dict(refusal.trailing_metadata())
    assert 0 < float(trailing["retry-after"]) < 60
    held[0].half_close()
    assert list(held[0].call) == []
    fourth = _OpenStream(limited.stub)
    fourth.send(_config(), *_audio(bytes(32_000)))
    fourth.half_close()
    assert _finals(fourth.call) == [""]
    held[1].half_close()
    assert list(held[1].call) == []


@pytest.mark.parametrize("n_sent", [0, 1, 6])
def test_sender_that_falls_silent_is_ended(limited: _MeasuredServer, n_sent: int) -> None:
    """Before its config, before any audio, and after some."""
    stream = _OpenStream(limited.stub)
    requests = [_config(), *_audio(bytes(10 * _PIECE_BYTES))]
    start = time.monotonic()
    stream.send(*requests[:n_sent])
    refusal = stream.refusal()
    assert refusal.code() == grpc.StatusCode.OUT_OF_RANGE
    assert f"{_IDLE_S:g} s" in str(refusal.details())
    assert _IDLE_S - 0.1 < time.monotonic() - start < _IDLE_S + 3
    _wait_until(lambda: limited.n_open("stream") == 0)


@dataclass
class _Crash:
    """What clients saw of a server that was killed, and of the one that followed it."""

    stream_finals: list[list[str]] = field(default_factory=list)
    recordings: list[list[str]] = field(default_factory=list)
    errors: list[grpc.RpcError] = field(default_factory=list)
    seconds_to_serve: float = 0.0
    operation_error: grpc.RpcError | None = None


@contextmanager
def _serve_on(port: int) -> Iterator[RunningServer]:
    """A server on this port, which may be killed."""
    command = [sys.executable, "-m", "service.cli", "serve", "--port", str(port)]
    command += ["--decoder", "greedy"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = _wait_for_address(process)
            with grpc.insecure_channel(address) as channel:
                yield RunningServer(process, address, speech_pb2_grpc.SpeechStub(channel))
        finally:
            process.kill()


def _slowly(pcm: bytes) -> Iterator[pb.StreamingRecognizeRequest]:
    yield _config()
    for request in _audio(pcm):
        yield request
        time.sleep(0.01)


@pytest.fixture(scope="module")
def crash(speech: FloatArray) -> _Crash:
    """Kill a server with three streams, a unary call and an operation on it; start another."""
    seen, pcm, port = _Crash(), to_pcm(speech), _free_port()

    def stream(stub: speech_pb2_grpc.SpeechStub) -> None:
        finals: list[str] = []
        seen.stream_finals.append(finals)
        try:
            for response in stub.StreamingRecognize(_slowly(pcm * 10), timeout=60):
                finals += _finals([response])
        except grpc.RpcError as error:
            seen.errors.append(error)

    def recordings(stub: speech_pb2_grpc.SpeechStub) -> None:
        try:
            while True:
                seen.recordings.append(_recognise(stub, pcm))
        except grpc.RpcError as error:
            seen.errors.append(error)

    with _serve_on(port) as first, ThreadPoolExecutor(4) as threads:
        work = [threads.submit(stream, first.stub) for _ in range(3)]
        work.append(threads.submit(recordings, first.stub))
        with grpc.insecure_channel(first.address) as channel:
            operation = cloud_speech_pb2_grpc.SpeechStub(channel).LongRunningRecognize(
                google.LongRunningRecognizeRequest(
                    config=google.RecognitionConfig(encoding=google.RecognitionConfig.LINEAR16),
                    audio=google.RecognitionAudio(content=bytes(600 * 32_000)),
                ),
                timeout=30,
            )
        _wait_until(
            lambda: len(seen.stream_finals) == 3 and all(map(len, seen.stream_finals)), seconds=30
        )
        os.kill(first.process.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        for future in work:
            future.result(timeout=20)
    with _serve_on(port) as second:
        assert _recognise(second.stub, to_pcm(speech[: 16_000 * 7])) != []
        seen.seconds_to_serve = time.monotonic() - killed_at
        with grpc.insecure_channel(second.address) as channel:
            operations = operations_pb2_grpc.OperationsStub(channel)
            try:
                operations.GetOperation(operations_pb2.GetOperationRequest(name=operation.name))
            except grpc.RpcError as error:
                seen.operation_error = error
    return seen


def test_killed_server_ends_calls_as_unavailable_and_told_nothing_wrong(
    crash: _Crash, measured: _MeasuredServer, speech: FloatArray
) -> None:
    assert [error.code() for error in crash.errors] == [grpc.StatusCode.UNAVAILABLE] * 4
    pcm = to_pcm(speech)
    expected = _stream(measured.stub, pcm * 2)
    for finals in crash.stream_finals:
        assert 0 < len(finals) < len(expected)
        assert finals == expected[: len(finals)]
    assert all(found == _recognise(measured.stub, pcm) for found in crash.recordings)


def test_killed_server_is_replaced_on_its_port_within_seconds(crash: _Crash) -> None:
    assert crash.seconds_to_serve < 15


def test_operation_of_a_killed_server_is_not_found_with_the_reason(crash: _Crash) -> None:
    assert crash.operation_error is not None
    assert crash.operation_error.code() == grpc.StatusCode.NOT_FOUND
    assert "kept in the server's memory" in str(crash.operation_error.details())


def _copy_bundle(bundle: Path, folder: Path) -> None:
    shutil.copytree(bundle, folder)
    _edit_config(folder, lambda config: config.update(name=folder.name))


def _edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    new = folder / "config.json.new"
    new.write_text(json.dumps(config))
    new.replace(path)  # at once, as nobody may see half of it


def _note_run(folder: Path, number: int) -> None:
    """Change the provenance of a bundle, and nothing else."""
    _edit_config(folder, lambda config: config["provenance"].update(run=number))


def _reload(server: RunningServer) -> str:
    command = [sys.executable, "-m", "service.cli", "models", "reload"]
    result = subprocess.run(
        [*command, "--address", server.address], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_models_are_exchanged_under_load_without_a_failure(
    tmp_path: Path, shipped_bundle: Path, speech: FloatArray
) -> None:
    for name in ("first", "second"):
        _copy_bundle(shipped_bundle, tmp_path / name)
    pcm = to_pcm(speech[: 16_000 * 8])
    half = len(pcm) // 4 * 2
    has_ended = threading.Event()
    with _run_measured("--models", str(tmp_path)) as server:
        stub = server.stub
        expected = _stream(stub, pcm, model="first")
        expected_whole = _recognise(stub, pcm, model="first")
        assert expected[0]
        assert expected_whole[0]

        def load(send: Callable[..., list[str]], expected: list[str]) -> int:
            n_sent = 0
            while not has_ended.is_set():
                assert send(stub, pcm, model="first") == expected
                n_sent += 1
            return n_sent

        with ThreadPoolExecutor(4) as threads:
            work = [
                threads.submit(load, send, wanted)
                for send, wanted in ((_recognise, expected_whole), (_stream, expected)) * 2
            ]
            try:
                for number in range(3):
                    open_stream = _OpenStream(stub)
                    open_stream.send(_config(model="first"), *_audio(pcm[:half]))
                    _note_run(tmp_path / "first", number)
                    _reload(server.server)
                    open_stream.send(*_audio(pcm[half:]))
                    open_stream.half_close()
                    assert _finals(open_stream.call) == expected
            finally:
                has_ended.set()
            assert all(future.result() >= 3 for future in work)
        (first, second) = stub.ListModels(pb.ListModelsRequest()).models
        assert (first.name, second.name) == ("first", "second")
        _wait_until(lambda: server.n_open("stream") == server.n_open("recording") == 0)


def test_sigterm_says_not_serving_and_lets_a_stream_end(speech: FloatArray) -> None:
    pcm = to_pcm(speech[: 16_000 * 8])
    with run_server("--decoder", "greedy", "--grace", "15") as server:
        expected = _stream(server.stub, pcm)
        stream = _OpenStream(server.stub)
        stream.send(_config(), *_audio(pcm[: 32_000 * 7]))
        first = next(stream.call)  # so it is under way
        with grpc.insecure_channel(server.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            server.process.send_signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
        assert not check_health(server.address)
        assert server.process.poll() is None
        stream.send(*_audio(pcm[32_000 * 7 :]))
        start = time.monotonic()
        stream.half_close()
        assert _finals([first, *stream.call]) == expected
        assert server.process.wait(timeout=15) == 0
        assert time.monotonic() - start < 8, "it waited for nobody"
