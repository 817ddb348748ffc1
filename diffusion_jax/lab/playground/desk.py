"""Gives jobs to the one thread that computes, and keeps what they left in memory."""

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from diffusion_jax.errors import ConfigError

WAITING = 4
"""Jobs that may wait for the one that is computed."""
_END = object()

T = TypeVar("T")
Gone = Callable[[], Awaitable[bool]]
"""Whether whoever asked has hung up."""


class BusyError(Exception):
    """As many jobs wait as may."""


class Desk:
    """One thread that computes, and who waits for it."""

    def __init__(self) -> None:
        """Starts no thread before there is something to do."""
        self.thread = ThreadPoolExecutor(1, "playground")
        self.order: list[str] = []
        """Jobs, the running one first."""
        self.stopped: set[str] = set()

    def enter(self, name: str = "") -> str:
        """Returns the name of a new job, which waits for its turn in `each`.

        Raises:
          BusyError: too many wait.
        """
        self.check()
        name = name or secrets.token_urlsafe(12)
        self.order.append(name)
        return name

    def check(self) -> None:
        """Raises BusyError where no other job may wait."""
        if len(self.order) > WAITING:
            raise BusyError

    def stop(self, name: str) -> bool:
        """Stops a job before its next step; returns whether there is one."""
        self.stopped |= {name} & set(self.order)
        return name in self.order

    async def each(self, name: str, work: Iterator[T], gone: Gone) -> AsyncIterator[T]:
        """Yields what a job makes, step by step, until it is stopped.

        Args:
          name: of `enter`.
          work: each of its steps is computed in the thread.
          gone: asked between two steps.
        """
        loop = asyncio.get_running_loop()
        try:
            while self.order[0] != name:
                await asyncio.sleep(0.02)
                if name in self.stopped or await gone():
                    return
            while name not in self.stopped and not await gone():
                one: Any = await loop.run_in_executor(self.thread, next, work, _END)
                if one is _END:
                    return
                yield one
        finally:
            self.order.remove(name)
            self.stopped.discard(name)


class Kept(Generic[T]):
    """The newest of some values, by names that nobody can guess; the oldest go."""

    def __init__(self, most: int, what: str) -> None:
        """Keeps `most` of what is called `what` in messages."""
        self.most, self.what = most, what
        self.values: OrderedDict[str, T] = OrderedDict()

    def put(self, value: T, name: str = "") -> str:
        """Returns the name of a value, a new one where none is given."""
        name = name or secrets.token_urlsafe(12)
        self.values[name] = value
        self.values.move_to_end(name)
        while len(self.values) > self.most:
            self.values.popitem(last=False)
        return name

    def get(self, name: str) -> T:
        """Returns a value that is still there.

        Raises:
          ConfigError: there is none of the name.
        """
        if name not in self.values:
            raise ConfigError(
                f"{self.what} must be among the last {self.most}; got another. Give "
                "it again."
            )
        self.values.move_to_end(name)
        return self.values[name]
