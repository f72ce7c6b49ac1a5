"""Plain code on the event loop's thread that lets others go on while it waits.

A fiber is a function that runs until it waits for a future; then the event loop goes on, and the
fiber after that, where it was. So a stream's code can be plain and pure, hundreds of streams share
one thread, and none waits for Python's lock: what takes long runs elsewhere and gives a future.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from typing import Any, TypeVar, cast

from greenlet import GreenletExit, getcurrent, greenlet

T = TypeVar("T")


class _Fiber(greenlet):  # type: ignore[misc]  # it has no types
    """Tells fibers from the code that they are started by."""


async def run_fiber(work: Callable[..., T], *arguments: object) -> T:
    """Run work here; what it raises is raised here.

    If this call is cancelled while the work waits, the work is given up where it stands.
    """
    fiber = _Fiber(work)
    fiber.gr_context = copy_context()
    awaited = fiber.switch(*arguments)
    try:
        while not fiber.dead:
            future = asyncio.wrap_future(awaited)
            await asyncio.wait([future])
            future.exception()  # the fiber is going to raise it
            awaited = fiber.switch()
    finally:
        if not fiber.dead:
            fiber.throw(GreenletExit)
    return cast("T", awaited)


def wait_for(future: Future[Any]) -> Any:  # noqa: ANN401  # the caller knows its type
    """The result of a future; in a fiber others go on until it is there, a thread just waits."""
    fiber = getcurrent()
    if isinstance(fiber, _Fiber) and not future.done():
        assert fiber.parent is not None
        fiber.parent.switch(future)
    return future.result()
