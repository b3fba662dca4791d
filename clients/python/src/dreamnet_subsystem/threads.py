"""Functions on threads of their own, a bounded number at a time."""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from .cycle import Stopped

T = TypeVar("T")


class LeftBehind(Stopped):
    """The thread still runs, and is not waited for any longer."""


class Threads:
    """Runs at most `most` functions at a time, each on a new thread.

    A thread can't be stopped, and those of `concurrent.futures` keep the process from ending. These don't: `join`
    waits for them for a while, and leaves those behind that still run.
    """

    def __init__(self, most: int) -> None:
        self._free = asyncio.Semaphore(most)
        self._running: dict[threading.Thread, asyncio.Future[Any]] = {}

    async def run(self, name: str, function: Callable[..., T], *args: Any) -> T:
        """The result of the function. A cancellation takes effect only before it begins."""
        async with self._free:
            loop = asyncio.get_running_loop()
            done: asyncio.Future[tuple[T | None, BaseException | None]] = loop.create_future()
            context = contextvars.copy_context()

            def deliver(result: T | None, problem: BaseException | None) -> None:
                if not done.done():
                    done.set_result((result, problem))

            def work() -> None:
                result, problem = None, None
                try:
                    result = context.run(function, *args)
                except BaseException as error:  # Also SystemExit, which would end only this thread.
                    problem = error
                with suppress(RuntimeError):  # The loop has ended without waiting any longer.
                    loop.call_soon_threadsafe(deliver, result, problem)

            thread = threading.Thread(target=work, name=name, daemon=True)
            self._running[thread] = done
            try:
                thread.start()
                while not done.done():
                    # The thread goes on, so the one that waits for its end does too.
                    with suppress(asyncio.CancelledError):
                        await asyncio.shield(done)
            finally:
                del self._running[thread]
        result, problem = done.result()
        if not isinstance(problem, LeftBehind):
            thread.join()  # It has delivered: it is about to end.
        if problem is not None:
            raise problem
        return result  # type: ignore[return-value]

    async def join(self, grace: float) -> list[str]:
        """Waits for all threads for this many seconds. Returns the names of those that are left behind."""
        if self._running:
            await asyncio.wait(self._running.values(), timeout=grace)
        left = {thread.name: done for thread, done in self._running.items() if not done.done()}
        for done in left.values():
            done.set_result((None, LeftBehind("still running when the process had to end")))
        return sorted(left)
