"""Operations: begun, asked for, waited for, ended early, forgotten; a client sees its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import grpc
import pytest
from google.longrunning import operations_pb2 as pb
from google.rpc.code_pb2 import Code

from service.api import operations as module
from service.api.operations import KEPT_S, Operations
from service.calls import Recording
from service.errors import AudioError, NotFoundError, OverloadError
from service.pb.google.cloud.speech.v1 import cloud_speech_pb2 as speech
from service.security import Client, current_client

CONTEXT = cast("grpc.aio.ServicerContext", None)  # it is not looked at
OnAudio = Callable[[float], object]


def _to_response(recording: Recording) -> speech.LongRunningRecognizeResponse:
    response = speech.LongRunningRecognizeResponse()
    response.total_billed_time.FromSeconds(round(recording.duration_s))
    return response


async def _succeed(on_audio: OnAudio) -> Recording:
    on_audio(7.0)
    return Recording((), duration_s=7.0, language="en-US")


async def _never_end(_: OnAudio) -> Recording:
    await asyncio.Event().wait()
    raise AssertionError


async def _start(
    operations: Operations,
    work: Callable[[OnAudio], Awaitable[Recording]],
    *,
    total_s: float | None = None,
    client: str | None = None,
) -> str:
    started = await operations.start(work, to_response=_to_response, total_s=total_s, client=client)
    return str(started.name)


async def _get(operations: Operations, name: str) -> pb.Operation:
    return await operations.GetOperation(pb.GetOperationRequest(name=name), CONTEXT)


async def _wait(operations: Operations, name: str, seconds: float | None = None) -> pb.Operation:
    request = pb.WaitOperationRequest(name=name)
    if seconds is not None:
        request.timeout.FromNanoseconds(round(seconds * 1e9))
    return await operations.WaitOperation(request, CONTEXT)


async def _cancel(operations: Operations, name: str) -> None:
    await operations.CancelOperation(pb.CancelOperationRequest(name=name), CONTEXT)


async def _list(operations: Operations, **fields: Any) -> pb.ListOperationsResponse:
    return await operations.ListOperations(pb.ListOperationsRequest(**fields), CONTEXT)


def _metadata(operation: pb.Operation) -> speech.LongRunningRecognizeMetadata:
    metadata = speech.LongRunningRecognizeMetadata()
    assert operation.metadata.Unpack(metadata)
    return metadata


@contextmanager
def _as_client(name: str) -> Iterator[None]:
    token = current_client.set(Client(name, is_admin=False))
    try:
        yield
    finally:
        current_client.reset(token)


def test_operation_ends_with_the_result_of_its_work() -> None:
    async def run() -> None:
        operations = Operations()
        may_end = asyncio.Event()

        async def work(on_audio: OnAudio) -> Recording:
            on_audio(2.5)
            await may_end.wait()
            return await _succeed(on_audio)

        started = await operations.start(work, to_response=_to_response, total_s=10.0, client=None)
        name = started.name
        assert not started.done
        running = await _get(operations, name)
        assert (running.name, running.done) == (name, False)
        assert _metadata(running).progress_percent == 25
        may_end.set()
        ended = await _wait(operations, name)
        assert ended.done
        assert not ended.HasField("error")
        response = speech.LongRunningRecognizeResponse()
        assert ended.response.Unpack(response)
        assert response.total_billed_time.seconds == 7
        assert _metadata(ended).progress_percent == 100
        assert _metadata(ended).start_time == _metadata(running).start_time
        assert await _get(operations, name) == ended

    asyncio.run(run())


def test_progress_is_never_whole_before_the_end_nor_told_where_the_length_is_unknown() -> None:
    async def run() -> None:
        operations = Operations()

        async def work(on_audio: OnAudio) -> Recording:
            on_audio(50.0)
            return await _never_end(on_audio)

        known = await _start(operations, work, total_s=10.0)
        unknown = await _start(operations, work)
        assert _metadata(await _get(operations, known)).progress_percent == 99
        assert _metadata(await _get(operations, unknown)).progress_percent == 0
        await operations.close()

    asyncio.run(run())


def test_wait_ends_with_its_time_and_no_later_than_the_operation() -> None:
    async def run() -> None:
        operations = Operations()
        may_end = asyncio.Event()

        async def work(on_audio: OnAudio) -> Recording:
            await may_end.wait()
            return await _succeed(on_audio)

        name = await _start(operations, work)
        for seconds in (0.0, 0.02, -5.0):
            assert not (await _wait(operations, name, seconds)).done
        waiting = asyncio.create_task(_wait(operations, name))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        may_end.set()
        assert (await waiting).done
        assert (await _wait(operations, name, 0.0)).done

    asyncio.run(run())


def test_refused_work_raises_at_the_start_and_leaves_no_operation() -> None:
    async def refuse(_: OnAudio) -> Recording:
        raise OverloadError("the server is busy", 1.0)

    async def run() -> None:
        operations = Operations()
        with pytest.raises(OverloadError, match="busy"):
            await _start(operations, refuse)
        assert not (await _list(operations)).operations

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (AudioError("the audio is empty"), Code.INVALID_ARGUMENT, "the audio is empty"),
        (ZeroDivisionError("secret"), Code.INTERNAL, "internal error"),
    ],
)
def test_work_that_fails_later_gives_its_status(error: Exception, code: int, message: str) -> None:
    async def fail(_: OnAudio) -> Recording:
        await asyncio.sleep(0.01)
        raise error

    async def run() -> None:
        operations = Operations()
        ended = await _wait(operations, await _start(operations, fail))
        assert ended.done
        assert ended.WhichOneof("result") == "error"
        assert ended.error.code == code
        assert message in ended.error.message
        assert "secret" not in ended.error.message

    asyncio.run(run())


@pytest.mark.timeout(30)
def test_cancelled_operation_stops_its_work_and_stays_as_cancelled() -> None:
    async def run() -> None:
        operations = Operations()
        has_stopped = asyncio.Event()

        async def work(on_audio: OnAudio) -> Recording:
            try:
                return await _never_end(on_audio)
            finally:
                has_stopped.set()

        name = await _start(operations, work)
        await _cancel(operations, name)
        assert has_stopped.is_set()
        ended = await _get(operations, name)
        assert ended.done
        assert ended.error.code == Code.CANCELLED
        await _cancel(operations, name)
        assert (await _get(operations, name)).error.code == Code.CANCELLED

    asyncio.run(run())


def test_cancelling_what_is_done_changes_nothing() -> None:
    async def run() -> None:
        operations = Operations()
        name = await _start(operations, _succeed)
        await _wait(operations, name)
        await _cancel(operations, name)
        assert (await _get(operations, name)).WhichOneof("result") == "response"

    asyncio.run(run())


def test_close_cancels_what_is_under_way() -> None:
    async def run() -> None:
        operations = Operations()
        n_stopped = 0

        async def work(on_audio: OnAudio) -> Recording:
            nonlocal n_stopped
            try:
                return await _never_end(on_audio)
            finally:
                n_stopped += 1

        for _ in range(3):
            await _start(operations, work)
        await operations.close()
        assert n_stopped == 3
        assert all(o.error.code == Code.CANCELLED for o in (await _list(operations)).operations)

    asyncio.run(run())


def test_unknown_name_says_what_may_have_happened_to_it() -> None:
    async def run() -> None:
        operations = Operations()
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: _get(operations, "nobody"),
            lambda: _wait(operations, "nobody"),
            lambda: _cancel(operations, "nobody"),
            lambda: operations.DeleteOperation(pb.DeleteOperationRequest(name="nobody"), CONTEXT),
        ]
        for call in calls:
            with pytest.raises(NotFoundError, match=r"'nobody'.*60 minutes.*send the recording"):
                await call()

    asyncio.run(run())


def test_deleted_operation_is_gone_and_its_work_goes_on() -> None:
    async def run() -> None:
        operations = Operations()
        may_end, has_ended = asyncio.Event(), asyncio.Event()

        async def work(on_audio: OnAudio) -> Recording:
            await may_end.wait()
            has_ended.set()
            return await _succeed(on_audio)

        name = await _start(operations, work)
        await operations.DeleteOperation(pb.DeleteOperationRequest(name=name), CONTEXT)
        with pytest.raises(NotFoundError):
            await _get(operations, name)
        assert not (await _list(operations)).operations
        may_end.set()
        await asyncio.wait_for(has_ended.wait(), 10)

    asyncio.run(run())


def test_list_comes_in_pages_in_the_order_of_the_starts() -> None:
    async def run() -> None:
        operations = Operations()
        names = [await _start(operations, _succeed) for _ in range(7)]
        found: list[str] = []
        sizes, token = [], ""
        while True:
            page = await _list(operations, page_size=3, page_token=token)
            found += [operation.name for operation in page.operations]
            sizes.append(len(page.operations))
            token = page.next_page_token
            if not token:
                break
        assert found == names
        assert sizes == [3, 3, 1]
        whole = await _list(operations)
        assert [operation.name for operation in whole.operations] == names
        assert whole.next_page_token == ""
        exact = await _list(operations, page_size=7)
        assert exact.next_page_token == ""
        behind = await _list(operations, page_token="9" * 5_000)
        assert not behind.operations

    asyncio.run(run())


def test_page_has_at_most_a_hundred_operations() -> None:
    async def run() -> None:
        operations = Operations()
        for _ in range(101):
            await _start(operations, _succeed)
        for size in (0, 1_000, -1):
            page = await _list(operations, page_size=size)
            assert len(page.operations) == 100
            assert page.next_page_token

    asyncio.run(run())


def test_operation_of_another_client_is_not_found() -> None:
    async def run() -> None:
        operations = Operations()
        name = await _start(operations, _never_end, client="anna")
        with _as_client("anna"):
            assert (await _get(operations, name)).name == name
            assert [o.name for o in (await _list(operations)).operations] == [name]
        with _as_client("bela"):
            for call in (_get, _wait, _cancel):
                with pytest.raises(NotFoundError):
                    await call(operations, name)
            request = pb.DeleteOperationRequest(name=name)
            with pytest.raises(NotFoundError):
                await operations.DeleteOperation(request, CONTEXT)
            assert not (await _list(operations)).operations
        with pytest.raises(NotFoundError):
            await _get(operations, name)
        with _as_client("anna"):
            assert not (await _get(operations, name)).done
        await operations.close()

    asyncio.run(run())


def test_operations_are_forgotten_some_time_after_they_are_done() -> None:
    async def run() -> None:
        operations = Operations()
        running = await _start(operations, _never_end)
        old, recent = [await _start(operations, _succeed) for _ in range(2)]
        for name, age_s in ((old, KEPT_S + 60), (recent, KEPT_S - 60)):
            await _wait(operations, name)
            ended = operations._operations[name]
            assert ended.finished_at is not None
            assert ended.finished_at == pytest.approx(time.monotonic(), abs=30)
            ended.finished_at -= age_s
        new = await _start(operations, _succeed)
        with pytest.raises(NotFoundError):
            await _get(operations, old)
        names = [operation.name for operation in (await _list(operations)).operations]
        assert names == [running, recent, new]
        await operations.close()

    asyncio.run(run())


def test_oldest_that_are_done_are_forgotten_when_there_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        monkeypatch.setattr(module, "_MOST_KEPT", 3)
        operations = Operations()
        running = await _start(operations, _never_end)
        names = []
        for _ in range(6):
            names.append(await _start(operations, _succeed))
            await _wait(operations, names[-1])
        found = [operation.name for operation in (await _list(operations)).operations]
        assert found == [running, *names[-2:]]
        await operations.close()

    asyncio.run(run())
