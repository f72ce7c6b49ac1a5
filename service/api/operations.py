"""google.longrunning.Operations: recordings whose senders come back for the result.

Operations live in the server's memory. They end with it, and some time after they are done.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import grpc
from google.longrunning import operations_pb2 as pb
from google.longrunning import operations_pb2_grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.rpc.code_pb2 import Code
from google.rpc.status_pb2 import Status

from service.api.fields import to_seconds
from service.api.status import status_of
from service.calls import Recording
from service.errors import NotFoundError
from service.pb.google.cloud.speech.v1 import cloud_speech_pb2 as speech
from service.security import current_client

Work = Callable[[Callable[[float], object]], Awaitable[Recording]]
"""Recognises a recording, given what is to be called with the seconds that are done."""

KEPT_S: Final = 3600.0
_MOST_KEPT: Final = 1000
_LONGEST_WAIT_S: Final = 300.0
_LARGEST_PAGE: Final = 100


@dataclass
class _Operation:
    message: pb.Operation
    client: str | None
    total_s: float | None
    done_s: float = 0.0
    task: asyncio.Task[None] | None = None
    is_done: asyncio.Event = field(default_factory=asyncio.Event)
    finished_at: float | None = None

    def note(self, seconds: float) -> None:
        self.done_s += seconds

    def describe(self) -> pb.Operation:
        """The operation as it is now."""
        progress = 100 if self.finished_at else 0
        if not self.finished_at and self.total_s:
            progress = min(99, int(100 * self.done_s / self.total_s))
        metadata = speech.LongRunningRecognizeMetadata()
        self.message.metadata.Unpack(metadata)
        metadata.progress_percent = progress
        if not self.message.done:
            metadata.last_update_time.GetCurrentTime()
        self.message.metadata.Pack(metadata)
        return self.message


class Operations(operations_pb2_grpc.OperationsServicer):  # type: ignore[misc]  # it has no types
    """All operations of a server; a client sees its own."""

    def __init__(self) -> None:
        self._operations: dict[str, _Operation] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(
        self,
        work: Work,
        *,
        to_response: Callable[[Recording], Message],
        total_s: float | None,
        client: str | None,
    ) -> pb.Operation:
        """Begin an operation.

        Args:
            work: what is to be done.
            to_response: makes its result.
            total_s: seconds of audio, where that is known.
            client: whose operation it is.

        Raises:
            VoxgateError: the work was refused before it began.
        """
        self._forget_old()
        metadata = speech.LongRunningRecognizeMetadata()
        metadata.start_time.GetCurrentTime()
        message = pb.Operation(name=secrets.token_hex(8))
        message.metadata.Pack(metadata)
        operation = _Operation(message, client, total_s)
        running = asyncio.ensure_future(work(operation.note))
        await asyncio.sleep(0)  # up to where it is queued or refused
        if running.done() and (error := running.exception()) is not None:
            raise error
        self._operations[message.name] = operation
        operation.task = asyncio.create_task(_finish(operation, running, to_response))
        self._tasks.add(operation.task)
        operation.task.add_done_callback(self._tasks.discard)
        await asyncio.sleep(0)  # a task that is cancelled before it began would never say so
        return operation.describe()

    async def close(self) -> None:
        """Cancel what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def GetOperation(  # noqa: N802  # the name gRPC calls
        self, request: pb.GetOperationRequest, context: grpc.aio.ServicerContext
    ) -> pb.Operation:
        """How far an operation is, or its result."""
        del context
        return self._find(request.name).describe()

    async def WaitOperation(  # noqa: N802  # the name gRPC calls
        self, request: pb.WaitOperationRequest, context: grpc.aio.ServicerContext
    ) -> pb.Operation:
        """The same, once it is done or the time is over."""
        del context
        operation = self._find(request.name)
        wanted_s = to_seconds(request.timeout) if request.HasField("timeout") else _LONGEST_WAIT_S
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(
                operation.is_done.wait(), min(max(0.0, wanted_s), _LONGEST_WAIT_S)
            )
        return operation.describe()

    async def ListOperations(  # noqa: N802  # the name gRPC calls
        self, request: pb.ListOperationsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListOperationsResponse:
        """The client's operations, page by page, in the order they began."""
        del context
        self._forget_old()
        mine = [o for o in self._operations.values() if o.client == _client()]
        start = int(request.page_token[:9]) if request.page_token.isdecimal() else 0
        size = min(max(0, request.page_size), _LARGEST_PAGE) or _LARGEST_PAGE
        end = start + size
        return pb.ListOperationsResponse(
            operations=[operation.describe() for operation in mine[start:end]],
            next_page_token=str(end) if end < len(mine) else "",
        )

    async def CancelOperation(  # noqa: N802  # the name gRPC calls
        self, request: pb.CancelOperationRequest, context: grpc.aio.ServicerContext
    ) -> Empty:
        """End an operation early; it stays as CANCELLED."""
        del context
        operation = self._find(request.name)
        if operation.task is not None:
            operation.task.cancel()
            await operation.is_done.wait()
        return Empty()

    async def DeleteOperation(  # noqa: N802  # the name gRPC calls
        self, request: pb.DeleteOperationRequest, context: grpc.aio.ServicerContext
    ) -> Empty:
        """Forget an operation; what is under way goes on unheard."""
        del context
        del self._operations[self._find(request.name).message.name]
        return Empty()

    def _find(self, name: str) -> _Operation:
        operation = self._operations.get(name)
        if operation is None or operation.client != _client():
            raise NotFoundError(
                f"there is no operation {name!r}: operations are kept in the server's memory, end "
                f"with it, and are forgotten {KEPT_S / 60:.0f} minutes after they are done; "
                "send the recording again"
            )
        return operation

    def _forget_old(self) -> None:
        now = time.monotonic()
        done = [(n, o.finished_at) for n, o in self._operations.items() if o.finished_at]
        n_too_many = len(self._operations) - _MOST_KEPT
        for number, (name, finished_at) in enumerate(done):
            if now - finished_at > KEPT_S or number < n_too_many:
                del self._operations[name]


async def _finish(
    operation: _Operation,
    running: asyncio.Future[Recording],
    to_response: Callable[[Recording], Message],
) -> None:
    """Wait for the work and keep what comes of it."""
    message = operation.message
    try:
        message.response.Pack(to_response(await running))
    except asyncio.CancelledError:
        running.cancel()
        message.error.CopyFrom(Status(code=Code.CANCELLED, message="the operation was cancelled"))
    except Exception as error:  # noqa: BLE001  # the edge: it becomes the operation's status
        message.error.CopyFrom(status_of(error))
    message.done = True
    operation.finished_at = time.monotonic()
    operation.is_done.set()


def _client() -> str | None:
    client = current_client.get()
    return client.name if client else None
