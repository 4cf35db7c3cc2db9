"""Several replicas on one machine, behind one address: a small process that hands requests on.

Each replica is a process of its own with the whole model, on a free port of the loopback interface. The front
checks keys and bodies as a single server does, hands each request to the replica with the fewest, and starts a
replica again that has died. Sessions live in one replica, whose number is part of their id; a list of them asks all. What a
key may have at once, sequences and sessions, is counted here, over all replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import sys
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple

import h11
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from plait.serve.errors import HTTPError, error_body, refusal
from plait.serve.events import event
from plait.serve.gate import Gate
from plait.serve.keys import Keys
from plait.serve.logs import log_event, logger, set_up_logging
from plait.serve.runner import bind, serve_app
from plait.serve.running import Admission
from plait.serve.settings import Settings
from plait.serve.sharing import check_sessions, new_sessions, sequences

__all__ = ["Front", "Replica", "run_front"]

_SESSION = re.compile(r"/v1/sessions/s([0-9]{1,4})-")
_DROPPED = {
    b"connection",
    b"transfer-encoding",
    b"keep-alive",
    b"date",
    b"x-request-id",
    b"x-content-type-options",
}
_NOT_HANDED_ON = {b"connection", b"content-length", b"transfer-encoding", b"host", b"origin", b"expect"}
_READY = b"ready "


class Target(NamedTuple):
    """Where a replica listens."""

    host: str
    port: int


class Replica:
    """A child process that serves the model.

    Args:
        number: its place among the replicas.
        settings: of the whole server.
    """

    def __init__(self, number: int, settings: Settings) -> None:
        self.number = number
        self.settings = settings
        self.process: asyncio.subprocess.Process | None = None
        self.target: Target | None = None
        self.running = 0

    async def start(self) -> None:
        """Start the process and wait until it serves.

        Raises:
            RuntimeError: it ended before.
        """
        own = self.settings.model_dump(mode="json")
        own |= {"host": "127.0.0.1", "port": 0, "replicas": 1}
        # Children get hashes, not keys.
        own["api_keys"] = [f"sha256:{digest.hex()}" for digest in Keys(self.settings.api_keys).hashes]
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "plait.serve.replica",
            str(self.number),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(own).encode() + b"\n")
        await self.process.stdin.drain()
        line = await self.process.stdout.readline()
        if not line.startswith(_READY):
            await self.process.wait()
            raise RuntimeError(f"replica {self.number} ended before it served; its messages are above")
        self.target = Target("127.0.0.1", int(line.removeprefix(_READY)))
        log_event("replica started", replica=self.number, process=self.process.pid)

    async def ended(self) -> int:
        """Wait until the process has ended; its exit status."""
        assert self.process is not None
        status = await self.process.wait()
        self.target = None
        return status

    async def stop(self) -> None:
        """Let it finish what it has begun, then end it."""
        if self.process is None or self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), self.settings.drain_seconds + 5)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


class Front:
    """The ASGI application in front of the replicas.

    Args:
        settings: of the server.
    """

    def __init__(self, settings: Settings) -> None:
        self.replicas = [Replica(number, settings) for number in range(settings.replicas)]
        self.settings = settings
        self.admission = Admission(settings)
        # Held by a key while it opens sessions, so that none is opened between counting and opening.
        self._opening: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._keepers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start all replicas, and keep them running from now on."""
        await asyncio.gather(*(replica.start() for replica in self.replicas))
        self._keepers = [asyncio.ensure_future(self._keep(replica)) for replica in self.replicas]

    async def close(self) -> None:
        """End all replicas."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(replica.stop() for replica in self.replicas))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        # The gate has read the body; it comes in one piece.
        body = (await receive()).get("body", b"")
        method, path, tenant = scope["method"], scope["path"], scope["state"]["tenant"]
        if (method, path) == ("GET", "/v1/sessions"):
            listed = {"object": "list", "data": await self._sessions(scope)}
            await JSONResponse(listed)(scope, receive, send)
            return
        if more := new_sessions(method, path, body):
            async with self._opening[tenant]:
                check_sessions(len(await self._sessions(scope)), more, self.settings)
                await self._hand_on(scope, body, receive, send)
            return
        count = sequences(method, path, body, self.settings)
        if count:
            self.admission.take(tenant, count)
        begun = time.monotonic()
        try:
            await self._hand_on(scope, body, receive, send)
        finally:
            if count:
                self.admission.give_back(tenant, count)
                self.admission.note(time.monotonic() - begun)

    async def _sessions(self, scope: Scope) -> list[dict[str, Any]]:
        """The sessions of a key in all replicas, oldest first."""
        headers = [*_handed_on(scope), (b"connection", b"close")]
        request = h11.Request(method="GET", target=b"/v1/sessions", headers=headers)

        async def of(target: Target) -> list[dict[str, Any]]:
            # One that dies now has no sessions any more.
            with contextlib.suppress(OSError, EOFError, h11.ProtocolError, KeyError, ValueError):
                parts = [part async for part in _answer(target, request, b"")]
                body = b"".join(bytes(part.data) for part in parts if isinstance(part, h11.Data))
                return list(json.loads(body)["data"])
            return []

        found = await asyncio.gather(*(of(one.target) for one in self.replicas if one.target is not None))
        return sorted((one for some in found for one in some), key=lambda one: (one["created"], one["id"]))

    async def _live(self, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "lifespan.startup"
        try:
            await self.start()
        except (OSError, RuntimeError) as error:
            await self.close()
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.close()
        await send({"type": "lifespan.shutdown.complete"})

    def _choose(self, path: str) -> Replica:
        """The replica that holds a session, or the one with the fewest requests.

        Raises:
            HTTPError: 503, that one, or all, are being started again.
        """
        candidates = self.replicas
        if found := _SESSION.match(path):
            candidates = [replica for replica in self.replicas if replica.number == int(found[1])]
            if not candidates:
                raise HTTPError(404, "There is no session of that name.", param="session")
        ready = [replica for replica in candidates if replica.target is not None]
        if not ready:
            raise HTTPError(503, "The replica is being started again. Try again.", retry_after=5)
        return min(ready, key=lambda replica: (replica.running, replica.number))

    async def _hand_on(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        replica = self._choose(scope["path"])
        replica.running += 1
        try:
            await self._answer_from(replica, scope, body, receive, send)
        finally:
            replica.running -= 1

    async def _answer_from(
        self, replica: Replica, scope: Scope, body: bytes, receive: Receive, send: Send
    ) -> None:
        assert replica.target is not None
        length = (b"content-length", str(len(body)).encode())
        headers = [*_handed_on(scope), length, (b"connection", b"close")]
        query = scope.get("query_string", b"")
        target = scope["path"].encode() if not scope.get("raw_path") else scope["raw_path"]
        request = h11.Request(
            method=scope["method"], target=target + (b"?" + query if query else b""), headers=headers
        )
        begun: h11.Response | None = None
        gone = asyncio.ensure_future(_gone(receive))
        answer = _answer(replica.target, request, body)
        try:
            while True:
                coming = asyncio.ensure_future(anext(answer))
                await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    coming.cancel()
                    await asyncio.gather(coming, return_exceptions=True)
                    return
                try:
                    part = coming.result()
                except StopAsyncIteration:
                    break
                if isinstance(part, h11.Response):
                    begun = part
                    kept = [(n, v) for n, v in part.headers if n.lower() not in _DROPPED]
                    await send({"type": "http.response.start", "status": part.status_code, "headers": kept})
                else:
                    await send({"type": "http.response.body", "body": bytes(part.data), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except (OSError, h11.ProtocolError, EOFError):
            await self._tell(replica, begun, scope, receive, send)
        finally:
            gone.cancel()
            await answer.aclose()

    async def _tell(
        self, replica: Replica, begun: h11.Response | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Tell a client that its replica died; in the stream itself where one has begun."""
        error = HTTPError(502, f"Replica {replica.number} ended before the answer was complete. Ask again.")
        logger.warning("replica lost", extra={"fields": {"replica": replica.number, "path": scope["path"]}})
        if begun is None:
            await refusal(error)(scope, receive, send)
            return
        kind = dict(begun.headers).get(b"content-type", b"")
        if kind.startswith(b"text/event-stream"):
            await send(
                {"type": "http.response.body", "body": b"\n\n" + event(error_body(error)), "more_body": False}
            )
        # A body of known length that ends early is an error for every client.

    async def _keep(self, replica: Replica) -> None:
        """Start a replica again whenever it ends, later each time if it does so at once."""
        pause = 0.5
        while True:
            begun = asyncio.get_running_loop().time()
            status = await replica.ended()
            log_event("replica ended", replica=replica.number, status=status)
            if asyncio.get_running_loop().time() - begun > 60:
                pause = 0.5
            while replica.target is None:
                await asyncio.sleep(pause)
                pause = min(2 * pause, 60.0)
                with contextlib.suppress(OSError, RuntimeError):
                    await replica.start()


def _handed_on(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The headers that a replica gets."""
    kept = [(name, value) for name, value in scope["headers"] if name.lower() not in _NOT_HANDED_ON]
    return [*kept, (b"host", b"127.0.0.1")]


async def _answer(
    target: Target, request: h11.Request, body: bytes
) -> AsyncGenerator[h11.Response | h11.Data, None]:
    """The parts of a replica's answer: the head, then pieces of the body.

    Raises:
        OSError, EOFError, h11.ProtocolError: the replica is gone.
    """
    reader, writer = await asyncio.open_connection(*target)
    try:
        connection = h11.Connection(h11.CLIENT)
        for part in (request, h11.Data(data=body), h11.EndOfMessage()):
            writer.write(connection.send(part) or b"")
        await writer.drain()
        while True:
            got = connection.next_event()
            if got is h11.NEED_DATA:
                data = await reader.read(65536)
                if not data and connection.their_state is h11.SEND_RESPONSE:
                    raise EOFError
                connection.receive_data(data)
            elif isinstance(got, h11.EndOfMessage):
                return
            elif isinstance(got, (h11.Response, h11.Data)):
                yield got
            elif isinstance(got, h11.ConnectionClosed):
                raise EOFError
    finally:
        writer.close()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def run_front(settings: Settings, say: Callable[[str], None]) -> None:
    """Serve with several replicas until SIGINT or SIGTERM.

    Raises:
        ConfigError: the address cannot be taken.
    """
    listener = bind(settings)
    with listener:
        set_up_logging(settings.log_format)
        app = Gate(Front(settings), settings, Keys(settings.api_keys))
        say(f"Starting {settings.replicas} replicas of {settings.model} ...")
        serve_app(app, listener, settings, say)
