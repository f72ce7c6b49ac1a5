"""Calls seen from outside, on a real port: ids, statuses, log lines, counts."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from service.errors import AudioError, OverloadError
from service.metrics import Metrics
from service.observe import (
    REQUEST_ID_KEY,
    CallInterceptor,
    JsonFormatter,
    TextFormatter,
    request_id,
)
from service.pb.voxgate.v1 import speech_pb2 as pb

MALFORMED = b"\xff\xff\xff\xff"
TRANSCRIPT = "a word that nobody logs"
UNARY, UP, DOWN, BOTH = "/test.Test/Unary", "/test.Test/Up", "/test.Test/Down", "/test.Test/Both"


def _response() -> pb.RecognizeResponse:
    alternative = pb.SpeechRecognitionAlternative(transcript=TRANSCRIPT)
    return pb.RecognizeResponse(results=[pb.SpeechRecognitionResult(alternatives=[alternative])])


async def _act(model: str, context: grpc.aio.ServicerContext) -> None:
    """Do what a request asks for by the name of its model."""
    if model == "unexpected":
        raise ZeroDivisionError("the secret of the server")
    if model == "audio":
        raise AudioError("the audio is empty")
    if model == "busy":
        raise OverloadError("the server is busy", 1.5)
    if model == "abort":
        await context.abort(grpc.StatusCode.NOT_FOUND, "not here")
    if model == "wait":
        await asyncio.Event().wait()


async def _unary(
    request: pb.RecognizeRequest, context: grpc.aio.ServicerContext
) -> pb.RecognizeResponse:
    await _act(request.config.model, context)
    return _response()


async def _up(
    requests: AsyncIterator[pb.RecognizeRequest], context: grpc.aio.ServicerContext
) -> pb.RecognizeResponse:
    async for request in requests:
        await _act(request.config.model, context)
    return _response()


async def _down(
    request: pb.RecognizeRequest, context: grpc.aio.ServicerContext
) -> AsyncIterator[pb.RecognizeResponse]:
    yield _response()
    await _act(request.config.model, context)
    yield _response()
    while request.config.model == "endless":
        yield _response()


async def _both(
    requests: AsyncIterator[pb.RecognizeRequest], context: grpc.aio.ServicerContext
) -> AsyncIterator[pb.RecognizeResponse]:
    async for request in requests:
        await _act(request.config.model, context)
        yield _response()


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    def __init__(self) -> None:
        kinds = {
            UNARY: (grpc.unary_unary_rpc_method_handler, _unary),
            UP: (grpc.stream_unary_rpc_method_handler, _up),
            DOWN: (grpc.unary_stream_rpc_method_handler, _down),
            BOTH: (grpc.stream_stream_rpc_method_handler, _both),
            "/grpc.health.v1.Health/Check": (grpc.unary_unary_rpc_method_handler, _unary),
        }
        self._methods = {
            name: make(handler, pb.RecognizeRequest.FromString, lambda r: r.SerializeToString())
            for name, (make, handler) in kinds.items()
        }

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._methods.get(details.method)


@dataclass(frozen=True)
class Answer:
    """How a call ended."""

    code: grpc.StatusCode
    details: str
    trailing: dict[str, Any]
    responses: list[bytes]


class Caller:
    """Calls the methods with bytes as they are."""

    def __init__(self, channel: grpc.aio.Channel, metrics: Metrics) -> None:
        self.channel = channel
        self._metrics = metrics

    async def call(
        self, method: str, *requests: bytes, metadata: tuple[tuple[str, str], ...] = ()
    ) -> Answer:
        """Send requests to a method of any kind, read everything."""
        responses: list[bytes] = []
        if method in (UP, BOTH):
            make = self.channel.stream_unary if method == UP else self.channel.stream_stream
            call = make(method)(iter(requests), metadata=metadata)
        else:
            make = self.channel.unary_stream if method == DOWN else self.channel.unary_unary
            call = make(method)(requests[0], metadata=metadata)
        with contextlib.suppress(grpc.aio.AioRpcError):
            if method in (DOWN, BOTH):
                async for response in call:
                    responses.append(response)  # noqa: PERF401  # those before an error count
            else:
                responses.append(await call)
        trailing = dict(tuple(pair) for pair in await call.trailing_metadata() or ())
        return Answer(await call.code(), await call.details(), trailing, responses)

    def count(self, method: str, code: str) -> float:
        """Calls of a method that ended with a code."""
        labels = {"method": method, "code": code}
        found = self._metrics.registry.get_sample_value("voxgate_requests_total", labels)
        return found or 0.0

    async def wait_for_count(self, method: str, code: str, count: float) -> None:
        """Wait until so many calls have ended so."""
        end = time.monotonic() + 20
        while self.count(method, code) < count:
            assert time.monotonic() < end, "waited in vain"
            await asyncio.sleep(0.005)


@asynccontextmanager
async def _server() -> AsyncIterator[Caller]:
    metrics = Metrics()
    server = grpc.aio.server(interceptors=[CallInterceptor(metrics)])
    server.add_generic_rpc_handlers([_Handlers()])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Caller(channel, metrics)
    finally:
        await server.stop(None)


def _run(work: Callable[[Caller], Awaitable[None]]) -> None:
    async def run() -> None:
        async with _server() as caller:
            await work(caller)

    asyncio.run(asyncio.wait_for(run(), 60))


def _request(model: str = "") -> bytes:
    return pb.RecognizeRequest(config=pb.RecognitionConfig(model=model)).SerializeToString()


@pytest.fixture
def log() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The service's log as JSON, read line by line."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("service")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.removeHandler(handler)
    logger.setLevel(level)


Log = Callable[[], list[dict[str, Any]]]
every_method = pytest.mark.parametrize("method", [UNARY, UP, DOWN, BOTH])


# --- statuses ------------------------------------------------------------------------------------


@every_method
def test_unexpected_error_tells_nothing_of_the_server_but_is_in_its_log(
    method: str, log: Log
) -> None:
    async def work(caller: Caller) -> None:
        answer = await caller.call(method, _request("unexpected"))
        assert answer.code == grpc.StatusCode.INTERNAL
        assert answer.details == "internal error; the server's log has the cause"
        assert "secret" not in str(answer)
        assert len(answer.responses) == (method == DOWN)  # what came before it
        await caller.wait_for_count(method, "INTERNAL", 1)

    _run(work)
    (line,) = [line for line in log() if line["level"] == "error"]
    assert "the secret of the server" in line["exception"]
    assert line["request_id"]


@every_method
def test_bytes_that_are_no_message_are_the_senders_fault(method: str) -> None:
    async def work(caller: Caller) -> None:
        answer = await caller.call(method, MALFORMED)
        assert answer.code == grpc.StatusCode.INVALID_ARGUMENT
        assert "cannot be parsed" in answer.details
        await caller.wait_for_count(method, "INVALID_ARGUMENT", 1)
        assert (await caller.call(method, _request())).code == grpc.StatusCode.OK

    _run(work)


def test_malformed_message_in_a_stream_comes_after_the_responses_so_far() -> None:
    async def work(caller: Caller) -> None:
        answer = await caller.call(BOTH, _request(), _request(), MALFORMED, _request())
        assert answer.code == grpc.StatusCode.INVALID_ARGUMENT
        assert len(answer.responses) == 2

    _run(work)


@every_method
def test_errors_raised_on_purpose_keep_their_status_and_message(method: str) -> None:
    async def work(caller: Caller) -> None:
        audio = await caller.call(method, _request("audio"))
        assert (audio.code, audio.details) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "the audio is empty",
        )
        gone = await caller.call(method, _request("abort"))
        assert (gone.code, gone.details) == (grpc.StatusCode.NOT_FOUND, "not here")
        busy = await caller.call(method, _request("busy"))
        assert busy.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert busy.trailing["retry-after"] == "1.5"
        assert busy.trailing["grpc-retry-pushback-ms"] == "1500"
        assert busy.trailing[REQUEST_ID_KEY]
        for code in ("INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"):
            await caller.wait_for_count(method, code, 1)

    _run(work)


def test_unknown_method_is_unimplemented() -> None:
    async def work(caller: Caller) -> None:
        answer = await caller.call("/test.Test/Nobody", _request())
        assert answer.code == grpc.StatusCode.UNIMPLEMENTED

    _run(work)


# --- ids -----------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("model", ["", "audio", "unexpected"])
def test_request_id_of_the_sender_comes_back(method: str, model: str, log: Log) -> None:
    said = "order-66/a:b~" + "x" * 100

    async def work(caller: Caller) -> None:
        metadata = ((REQUEST_ID_KEY, said),)
        answer = await caller.call(method, _request(model), metadata=metadata)
        assert answer.trailing[REQUEST_ID_KEY] == said
        await caller.wait_for_count(method, answer.code.name, 1)

    _run(work)
    assert log()
    assert {line["request_id"] for line in log()} == {said}


@pytest.mark.parametrize("said", [None, "", "two words", "x" * 129])
def test_unusable_request_id_is_replaced_by_one_of_the_servers(said: str | None) -> None:
    async def work(caller: Caller) -> None:
        metadata = () if said is None else ((REQUEST_ID_KEY, said),)
        answers = [
            await caller.call(method, _request(), metadata=metadata)
            for method in (UNARY, UNARY, BOTH)
        ]
        ids = [answer.trailing[REQUEST_ID_KEY] for answer in answers]
        assert all(re.fullmatch(r"[0-9a-f]{16}", found) for found in ids)
        assert len(set(ids)) == 3

    _run(work)


# --- the log -------------------------------------------------------------------------------------


@every_method
def test_each_call_has_one_line_without_its_transcript(method: str, log: Log) -> None:
    async def work(caller: Caller) -> None:
        answer = await caller.call(method, _request(), metadata=((REQUEST_ID_KEY, "mine"),))
        assert TRANSCRIPT.encode() in answer.responses[0]
        await caller.call(method, _request("audio"), metadata=((REQUEST_ID_KEY, "other"),))
        await caller.wait_for_count(method, "INVALID_ARGUMENT", 1)

    _run(work)
    good, bad = log()
    assert (good["method"], good["code"], good["request_id"]) == (method, "OK", "mine")
    assert (bad["method"], bad["code"], bad["request_id"]) == (method, "INVALID_ARGUMENT", "other")
    assert bad["details"] == "the audio is empty"
    assert "details" not in good
    for line in (good, bad):
        assert line["level"] == "info"
        assert 0 <= line["seconds"] < 60
        assert line["peer"].startswith("ipv4:127.0.0.1:")
        assert TRANSCRIPT not in json.dumps(line)


def test_health_checks_are_neither_logged_nor_counted(log: Log) -> None:
    health = "/grpc.health.v1.Health/Check"

    async def work(caller: Caller) -> None:
        assert (await caller.call(health, _request())).code == grpc.StatusCode.OK
        assert caller.count(health, "OK") == 0

    _run(work)
    assert log() == []


def test_text_formatter_says_when_how_long_and_why() -> None:
    formatter = TextFormatter()
    plain = logging.makeLogRecord({"msg": "listening on %s", "args": ("port",)})
    assert formatter.format(plain) == "listening on port"
    call = {"msg": "/Recognize FAILED", "seconds": 1.234, "client": "desk", "details": "no audio"}
    token = request_id.set("abc")
    try:
        line = formatter.format(logging.makeLogRecord(call))
    finally:
        request_id.reset(token)
    expected = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d /Recognize FAILED 1\.23 s desk no audio \[abc\]"
    assert re.fullmatch(expected, line)


def test_formatter_writes_one_json_object_a_line() -> None:
    formatter = JsonFormatter()
    record = logging.makeLogRecord(
        {"msg": "two\nlines of %s", "args": ("text",), "levelno": 30, "levelname": "WARNING"}
    )
    record.path = io  # no JSON knows how to write it
    record.nothing = None
    line = formatter.format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert found["message"] == "two\nlines of text"
    assert found["level"] == "warning"
    assert "module" in found["path"]
    assert not {"nothing", "request_id", "args", "msg"} & set(found)
    token = request_id.set("mine")
    try:
        assert json.loads(formatter.format(record))["request_id"] == "mine"
    finally:
        request_id.reset(token)


# --- counts --------------------------------------------------------------------------------------


def test_calls_are_counted_by_method_and_code() -> None:
    async def work(caller: Caller) -> None:
        for model in ("", "", "", "audio", "audio", "unexpected"):
            await caller.call(UNARY, _request(model))
        await caller.call(BOTH, _request())
        expected = {"OK": 3, "INVALID_ARGUMENT": 2, "INTERNAL": 1, "CANCELLED": 0}
        for code, count in expected.items():
            await caller.wait_for_count(UNARY, code, count)
        await caller.wait_for_count(BOTH, "OK", 1)
        assert {code: caller.count(UNARY, code) for code in expected} == expected
        assert caller.count(BOTH, "INVALID_ARGUMENT") == 0

    _run(work)


@every_method
def test_call_that_its_sender_cancels_counts_as_cancelled(method: str, log: Log) -> None:
    async def work(caller: Caller) -> None:
        if method == UNARY:
            call = caller.channel.unary_unary(method)(_request("wait"))
        elif method == DOWN:
            call = caller.channel.unary_stream(method)(_request("wait"))
            assert await call.read()
        else:
            up = caller.channel.stream_unary if method == UP else caller.channel.stream_stream
            call = up(method)()
            if method == BOTH:
                await call.write(_request())
                assert await call.read()
            await call.write(_request("wait"))
        await asyncio.sleep(0.1)  # the others have no sign that the server began
        call.cancel()
        await caller.wait_for_count(method, "CANCELLED", 1)
        assert caller.count(method, "OK") == 0

    _run(work)
    (line,) = log()
    assert (line["code"], line["level"]) == ("CANCELLED", "info")


def test_call_whose_time_is_over_is_not_counted_as_served() -> None:
    async def work(caller: Caller) -> None:
        with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE"):
            await caller.channel.unary_unary(UNARY)(_request("wait"), timeout=0.2)
        await caller.wait_for_count(UNARY, "CANCELLED", 1)
        assert caller.count(UNARY, "OK") == 0

    _run(work)


def test_reader_that_leaves_while_the_server_sends_counts_as_cancelled(log: Log) -> None:
    """gRPC gives such a call up without a word to its handler, which ends when it is collected."""

    async def work(caller: Caller) -> None:
        for n_left in range(1, 6):
            metadata = ((REQUEST_ID_KEY, f"call-{n_left}"),)
            call = caller.channel.unary_stream(DOWN)(_request("endless"), metadata=metadata)
            assert await call.read()
            call.cancel()
            await caller.wait_for_count(DOWN, "CANCELLED", n_left)
        assert (await caller.call(DOWN, _request())).code == grpc.StatusCode.OK

    _run(work)
    assert [line["code"] for line in log()] == ["CANCELLED"] * 5 + ["OK"]
    assert [line["request_id"] for line in log()[:5]] == [f"call-{i}" for i in range(1, 6)]
    assert all(line["peer"].startswith("ipv4:127.0.0.1:") for line in log())
