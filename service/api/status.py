"""Errors as gRPC statuses: the one table."""

from __future__ import annotations

import asyncio
import logging
from typing import Final, NoReturn

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from service.errors import (
    BundleError,
    IdleError,
    InputError,
    NotFoundError,
    OverloadError,
    PermissionDeniedError,
    ProviderError,
    VoxgateError,
)

logger = logging.getLogger(__name__)

_CODES: Final[tuple[tuple[type[VoxgateError], grpc.StatusCode], ...]] = (
    (InputError, grpc.StatusCode.INVALID_ARGUMENT),
    (OverloadError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (IdleError, grpc.StatusCode.OUT_OF_RANGE),
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (PermissionDeniedError, grpc.StatusCode.PERMISSION_DENIED),
    (BundleError, grpc.StatusCode.FAILED_PRECONDITION),
    (ProviderError, grpc.StatusCode.FAILED_PRECONDITION),
)
_MOST_DETAILS: Final = 600
"""Characters of a status; percent-encoded they fit into the 8 KiB of trailers that clients take."""
_INTERNAL: Final = "internal error; the server's log has the cause"


async def abort_with(error: Exception, context: grpc.aio.ServicerContext) -> NoReturn:
    """End the call with the status of an error; what was not meant for the user stays in the log.

    Raises:
        Exception: always; gRPC ends the call by one.
    """
    if isinstance(error, grpc.aio.AbortError | asyncio.CancelledError):
        raise error
    code, details = _describe(error)
    trailing = tuple(context.trailing_metadata() or ())
    if isinstance(error, OverloadError):
        trailing += _retry_hint(error)
    await context.abort(code, details, trailing)
    raise AssertionError("abort returned") from error


def status_of(error: Exception) -> Status:
    """An error as the result of an operation that failed."""
    code, details = _describe(error)
    return Status(code=code.value[0], message=details)


def _describe(error: Exception) -> tuple[grpc.StatusCode, str]:
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, _clip(str(error))
    logger.error("a request failed inside the server", exc_info=error)
    return grpc.StatusCode.INTERNAL, _INTERNAL


def _clip(details: str) -> str:
    """At most `_MOST_DETAILS` characters: messages repeat what was sent."""
    if len(details) <= _MOST_DETAILS:
        return details
    half = _MOST_DETAILS // 2 - 2
    return f"{details[:half]} … {details[-half:]}"  # what was expected stands at the end


def _retry_hint(error: OverloadError) -> tuple[tuple[str, str | bytes], ...]:
    """When to try again: for people, for gRPC's own retries, and for Google's clients."""
    delay = Duration()
    delay.FromMilliseconds(round(1000 * error.retry_s))
    details = Any()
    details.Pack(RetryInfo(retry_delay=delay))
    status = Status(code=Code.RESOURCE_EXHAUSTED, message=_clip(str(error)), details=[details])
    return (
        ("retry-after", f"{error.retry_s:g}"),
        ("grpc-retry-pushback-ms", str(round(1000 * error.retry_s))),
        ("grpc-status-details-bin", status.SerializeToString()),
    )
