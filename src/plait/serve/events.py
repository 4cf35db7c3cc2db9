"""Server-sent events: a stream that ends when its client goes away, and that no slow reader can hold open."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["EventStream", "event", "unless_gone"]

T = TypeVar("T")


def event(data: Any) -> bytes:
    """One event; text is sent as it is, anything else as JSON."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # Half of a surrogate pair cannot be sent, and a line break would end the event.
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


class EventStream(Response):
    """A response of events.

    Args:
        events: the events, each as `event` makes it.
        close: called when nothing more is sent, whatever the reason.
        ping_seconds: seconds of silence after which a comment keeps the connection open.
        send_seconds: seconds that the client may take to accept a piece before the stream is given up.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        close: Callable[[], Awaitable[None]],
        *,
        ping_seconds: float,
        send_seconds: float,
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events = events
        self.close = close
        self.ping_seconds = ping_seconds
        self.send_seconds = send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sender, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sender, gone):
                task.cancel()
            await asyncio.gather(sender, gone, return_exceptions=True)
            await self.events.aclose()
            await self.close()
        error = None if sender.cancelled() else sender.exception()
        # A client that reads too slowly, or not at all, is no failure of the server.
        if error is not None and not isinstance(error, (TimeoutError, OSError)):
            raise error

    async def _send(self, send: Send) -> None:
        async def put(body: bytes, more: bool = True) -> None:
            async with asyncio.timeout(self.send_seconds):
                await send({"type": "http.response.body", "body": body, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        coming: asyncio.Future[bytes] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(self.events))
                done, _ = await asyncio.wait({coming}, timeout=self.ping_seconds)
                if not done:
                    await put(b": ping\n\n")
                    continue
                try:
                    body = coming.result()
                except StopAsyncIteration:
                    break
                finally:
                    coming = None
                await put(body)
        finally:
            if coming is not None:
                coming.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await coming
        await put(b"", more=False)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """What some work returns; None, and the work is cancelled, if the client goes away first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
    return None if task.cancelled() else task.result()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
