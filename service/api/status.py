"""Errors as gRPC statuses: the one table."""

from __future__ import annotations

import asyncio
import logging
from typing import Final, NoReturn

import grpc

from service.errors import (
    BundleError,
    InputError,
    ProviderError,
    RequestError,
    VoxgateError,
)

logger = logging.getLogger(__name__)

_CODES: Final[tuple[tuple[type[VoxgateError], grpc.StatusCode], ...]] = (
    (InputError, grpc.StatusCode.INVALID_ARGUMENT),
    (BundleError, grpc.StatusCode.FAILED_PRECONDITION),
    (ProviderError, grpc.StatusCode.FAILED_PRECONDITION),
)


async def abort_with(error: Exception, context: grpc.aio.ServicerContext) -> NoReturn:
    """End the call with the status of an error; what was not meant for the user stays in the log.

    Raises:
        Exception: always; gRPC ends the call by one.
    """
    if isinstance(error, grpc.aio.AbortError | asyncio.CancelledError):
        raise error
    for kind, code in _CODES:
        if isinstance(error, kind):
            await context.abort(code, str(error))
    logger.error("a request failed inside the server", exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has the cause")
    raise AssertionError("abort returned") from error


def refuse(field: str, *, is_set: bool) -> None:
    """Refuse a field that is not served yet.

    Raises:
        RequestError: it is set.
    """
    if is_set:
        raise RequestError(f"{field} is not served yet; leave it unset")
