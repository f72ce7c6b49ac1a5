"""What is known of every call from outside: its id, how it ended, how long it took.

Each call gets a line in the log and a count in the metrics. Transcripts are in neither. A message
that cannot be parsed, and an error that nobody expected, end the call with a status that tells
nothing about the inside of the server.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import grpc

from service.api.status import abort_with
from service.errors import RequestError
from service.metrics import Metrics
from service.security import current_client

logger = logging.getLogger(__name__)

REQUEST_ID_KEY: Final = "x-request-id"
_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
_QUIET: Final = ("/grpc.health.v1.", "/grpc.reflection.")
_UNPARSED: Final = object()

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the call that is being handled."""


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Wraps every handler; put it before all other interceptors."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """The method's own handler, observed."""
        method = handler_call_details.method
        said = dict(handler_call_details.invocation_metadata or ()).get(REQUEST_ID_KEY, "")
        is_usable = isinstance(said, str) and _REQUEST_ID.fullmatch(said)
        request_id.set(said if is_usable else secrets.token_hex(8))
        handler = await continuation(handler_call_details)
        if handler is None or method.startswith(_QUIET):
            return handler
        return self._observed(handler, method)

    def _observed(self, handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
        kinds = {
            (False, False): (grpc.unary_unary_rpc_method_handler, "unary_unary"),
            (False, True): (grpc.unary_stream_rpc_method_handler, "unary_stream"),
            (True, False): (grpc.stream_unary_rpc_method_handler, "stream_unary"),
            (True, True): (grpc.stream_stream_rpc_method_handler, "stream_stream"),
        }
        make, name = kinds[handler.request_streaming, handler.response_streaming]
        inner = getattr(handler, name)

        async def answer(request: object, context: grpc.aio.ServicerContext) -> object:
            with self._note(method, context):
                try:
                    _refuse_unparsed(request)
                    return await inner(request, context)
                except Exception as error:  # noqa: BLE001  # the edge: everything becomes a status
                    await abort_with(error, context)

        async def answers(
            request: object, context: grpc.aio.ServicerContext
        ) -> AsyncIterator[object]:
            with self._note(method, context):
                try:
                    _refuse_unparsed(request)
                    async for response in inner(request, context):
                        yield response
                except Exception as error:  # noqa: BLE001  # the edge: everything becomes a status
                    await abort_with(error, context)

        return make(
            answers if handler.response_streaming else answer,
            request_deserializer=_lenient(handler),
            response_serializer=handler.response_serializer,
        )

    @contextmanager
    def _note(self, method: str, context: grpc.aio.ServicerContext) -> Iterator[None]:
        """Log and count one call."""
        start = time.perf_counter()
        peer = context.peer()  # of a call that is over, asking for it crashes the process
        context.set_trailing_metadata(((REQUEST_ID_KEY, request_id.get()),))
        code = grpc.StatusCode.CANCELLED  # unless it ends in another way
        try:
            yield
            code = grpc.StatusCode.OK
        except grpc.aio.AbortError:
            code = _code_of(context)
            raise
        finally:
            client = current_client.get()
            self._metrics.requests.labels(method, code.name).inc()
            logger.info(
                "%s %s",
                method,
                code.name,
                extra={
                    "method": method,
                    "code": code.name,
                    "seconds": round(time.perf_counter() - start, 4),
                    "client": client.name if client else None,
                    "peer": peer,
                    "details": context.details() or None if code != grpc.StatusCode.OK else None,
                },
            )


def _code_of(context: grpc.aio.ServicerContext) -> grpc.StatusCode:
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return next((known for known in grpc.StatusCode if known.value[0] == code), grpc.StatusCode.OK)


def _lenient(handler: grpc.RpcMethodHandler) -> Callable[[bytes], object]:
    """A parser whose failure is the sender's, not the server's."""
    parse = handler.request_deserializer or (lambda data: data)

    def try_to_parse(data: bytes) -> object:
        try:
            return parse(data)
        except Exception as error:
            if handler.request_streaming:  # it comes out where the handler reads
                raise _malformed() from error
            return _UNPARSED

    return try_to_parse


def _refuse_unparsed(request: object) -> None:
    if request is _UNPARSED:
        raise _malformed()


def _malformed() -> RequestError:
    return RequestError(
        "the message cannot be parsed; generate the client from this server's .proto files "
        "(server reflection has them)"
    )


class TextFormatter(logging.Formatter):
    """The message, and of a call also when it ended, its seconds, client, details and id."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        known, line = vars(record), super().format(record)
        if "seconds" not in known:
            return line
        said = [str(known[name]) for name in ("client", "details") if known.get(name)]
        time_ = self.formatTime(record, "%Y-%m-%d %H:%M:%S")
        took, id_ = f"{known['seconds']:.2f} s", f"[{request_id.get()}]"
        return " ".join([time_, line, took, *said, id_])


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's time, level, message, request id, and what `extra` gave it."""
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id.get():
            line["request_id"] = request_id.get()
        line |= {
            name: value
            for name, value in vars(record).items()
            if name not in _RECORD_FIELDS and value is not None
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


_RECORD_FIELDS: Final = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


def log_to_stderr(*, as_json: bool) -> None:
    """Write all of this process's log on stderr, as JSON lines or for people."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
