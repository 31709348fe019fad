"""One request to a store: a deadline and an allowance of bytes for all of it, whatever the store sends.

A store may be anybody's: it may list without end, say sizes that are not so, send more than was asked for, or a byte a
minute. The file systems of fsspec wait for it and keep all of it.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# Seconds that what is stopped has to end in.
_GRACE = 2.0
# Bytes of one answer: more than any page of a list and any range that is asked for. It is parsed between two looks at
# the clock.
_MOST_AT_ONCE = 10 << 20
# Bytes that the request of this task may still receive, as a list of one.
_ALLOWANCE: ContextVar[list[int] | None] = ContextVar("allowance", default=None)


class TooMuchError(ValueError):
    """A store sends more than a request may have."""


class TooLateError(Exception):
    """A store has not answered a request to its end in time."""


def ask(system: AbstractFileSystem, method: str, *args: Any, seconds: float, most: int, **named: Any) -> Any:
    """Call a method of a file system, and return what it returns.

    seconds: for all of it; most: bytes that may come, headers aside. What is still under way then is stopped. Where a
    file system is not asynchronous, as that of the Hub is not, the bytes are not counted.

    Raises TooMuchError, TooLateError, and what the method raises.
    """
    if not system.async_impl:
        return _in_thread(functools.partial(getattr(system, method), *args, **named), seconds)

    async def bounded() -> Any:
        _ALLOWANCE.set([most])
        return await getattr(system, f"_{method}")(*args, **named)

    ended = threading.Event()

    async def timed() -> Any:
        # A task of its own: what the method itself raises on a timeout of its own is not our deadline's.
        task = asyncio.ensure_future(bounded())
        try:
            done, _ = await asyncio.wait({task}, timeout=seconds)
            if done:
                return task.result()
            raise TooLateError
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=_GRACE)
            ended.set()

    future = asyncio.run_coroutine_threadsafe(timed(), system.loop)
    try:
        return future.result()
    except BaseException:
        # A program that ends meanwhile would show a traceback of it.
        if future.cancel():
            ended.wait(_GRACE)
        raise


def _in_thread(call: Any, seconds: float) -> Any:
    """Call in a thread that nobody waits for when its time is up."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.extend((True, call()))
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            result.extend((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if len(result) < 2:
        raise TooLateError
    if not result[0]:
        raise result[1]
    return result[1]


class _CountedStream:
    """The body of an answer, whose bytes count against the allowance of its request."""

    def __init__(self, stream: Any, allowance: list[int]) -> None:
        self._stream, self._allowance, self._room = stream, allowance, _MOST_AT_ONCE

    async def read(self, n: int = -1) -> bytes:
        if n >= 0:
            return self._counted(await self._stream.read(n))
        parts = []
        while part := self._counted(await self._stream.readany()):
            parts.append(part)
        return b"".join(parts)

    def _counted(self, data: bytes) -> bytes:
        self._allowance[0] -= len(data)
        self._room -= len(data)
        if self._allowance[0] < 0 or self._room < 0:
            raise TooMuchError("sends more than was asked for")
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _count(response: Any) -> None:
    """Let the body of an answer of aiohttp count against the allowance of the request under way."""
    allowance = _ALLOWANCE.get()
    if allowance is not None:
        response.content = _CountedStream(response.content, allowance)


@functools.cache
def s3_session() -> type:
    """Return the session class for aiobotocore (`http_session_cls`) whose answers are counted."""
    from aiobotocore.httpsession import AIOHTTPSession

    class CountedSession(AIOHTTPSession):
        async def send(self, request: Any) -> Any:
            # Otherwise it is read whole before it is handed over.
            streamed, request.stream_output = request.stream_output, True
            try:
                answer = await super().send(request)
            finally:
                request.stream_output = streamed
            _count(answer.raw)
            if not streamed:
                await answer.content
            return answer

    return CountedSession


async def http_client(**named: Any) -> Any:
    """Return the client of fsspec's file system for https:// (`get_client`), whose answers are counted."""
    import aiohttp

    class CountedResponse(aiohttp.ClientResponse):
        async def start(self, connection: Any) -> Any:
            await super().start(connection)
            _count(self)
            return self

    return aiohttp.ClientSession(response_class=CountedResponse, **named)
