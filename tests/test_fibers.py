"""Plain code that waits without keeping its thread."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar

import pytest

from service.fibers import run_fiber, wait_for

_name: ContextVar[str] = ContextVar("_name", default="")


def test_others_go_on_while_a_fiber_waits_and_all_run_on_one_thread() -> None:
    futures: list[Future[int]] = [Future(), Future()]
    said: list[str] = []
    threads = set()

    def work(number: int) -> int:
        said.append(f"{number} begins")
        found = int(wait_for(futures[number]))
        threads.add(threading.get_ident())
        said.append(f"{number} has {found}")
        return found + int(wait_for(futures[number]))

    async def run() -> list[int]:
        both = asyncio.gather(run_fiber(work, 0), run_fiber(work, 1))
        await asyncio.sleep(0.01)
        assert said == ["0 begins", "1 begins"]
        futures[1].set_result(5)
        await asyncio.sleep(0.01)
        futures[0].set_result(7)
        return list(await both)

    assert asyncio.run(run()) == [14, 10]
    assert said == ["0 begins", "1 begins", "1 has 5", "0 has 7"]
    assert threads == {threading.get_ident()}


def test_errors_of_the_work_and_of_what_it_waits_for_are_raised() -> None:
    def fail_at_once() -> None:
        raise ValueError("at once")

    def fail_later() -> None:
        with ThreadPoolExecutor(1) as pool:
            wait_for(pool.submit(fail_at_once))

    for work in (fail_at_once, fail_later):
        with pytest.raises(ValueError, match="at once"):
            asyncio.run(run_fiber(work))


def test_a_cancelled_call_gives_its_work_up_where_it_stands() -> None:
    future: Future[None] = Future()
    said = []

    def work() -> None:
        try:
            wait_for(future)
            said.append("went on")
        finally:
            said.append("cleaned up")

    async def run() -> None:
        task = asyncio.create_task(run_fiber(work))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        future.set_result(None)
        await asyncio.sleep(0.01)

    asyncio.run(run())
    assert said == ["cleaned up"]


def test_a_fiber_sees_the_variables_of_its_call() -> None:
    future: Future[None] = Future()

    def work() -> str:
        wait_for(future)
        return _name.get()

    async def call(name: str) -> str:
        _name.set(name)
        return await run_fiber(work)

    async def run() -> list[str]:
        both = asyncio.gather(call("one"), call("two"))
        await asyncio.sleep(0.01)
        future.set_result(None)
        return list(await both)

    assert asyncio.run(run()) == ["one", "two"]


def test_outside_of_a_fiber_a_thread_waits() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert wait_for(pool.submit(lambda: 3)) == 3
