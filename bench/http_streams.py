"""Servers as processes, and streams of server-sent events read as cheaply as can be.

The client shares the machine with the server, so it parses nothing but the lines of a stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

__all__ = ["Answer", "Server", "stream"]

HOST = "127.0.0.1"


class Answer(NamedTuple):
    """How one stream went.

    Attributes:
        first: seconds to the first event with text; 0 where there was none.
        longest: longest seconds without an event, from the request on.
        events: events that came.
        tokens: new tokens, as the server counts them, or else one for each event.
        text: what was said.
        error: what went wrong; None for nothing, or where the client left.
    """

    first: float
    longest: float
    events: int
    tokens: int
    text: str
    error: str | None


async def stream(
    port: int, path: str, body: dict[str, Any], *, leave_after: int | None = None, patience: float = 120.0
) -> Answer:
    """Ask, and read the answer to its end, or leave after some events.

    Args:
        body: sent with `stream: true`.
        leave_after: events after which the connection is dropped.
        patience: seconds of silence after which the answer counts as failed.
    """
    content = json.dumps({**body, "stream": True}).encode()
    begun = before = time.monotonic()
    first = longest = 0.0
    events = counted = 0
    said: list[str] = []
    error: str | None = None
    writer: asyncio.StreamWriter | None = None
    try:
        reader, writer = await asyncio.open_connection(HOST, port, limit=2**20)
        head = f"POST {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
        status = await asyncio.wait_for(reader.readline(), patience)
        if b" 200" not in status:
            rest = await asyncio.wait_for(reader.read(2000), patience)
            return Answer(0.0, 0.0, 0, 0, "", f"{status!r} {rest[-300:]!r}")
        error = "the stream ended early"
        while line := await asyncio.wait_for(reader.readline(), patience):
            if not line.startswith(b"data: "):
                continue
            data = line[6:].strip()
            if data == b"[DONE]":
                error = None
                break
            now = time.monotonic()
            longest, before = max(longest, now - before), now
            told = json.loads(data)
            if "error" in told:
                error = str(told["error"])
                break
            if usage := told.get("usage"):
                counted = usage["completion_tokens"]
            for choice in told["choices"]:
                text = choice.get("text") or choice.get("delta", {}).get("content") or ""
                said.append(text)
                if text or choice.get("logprobs"):
                    first = first or now - begun
                    events += 1
            if leave_after is not None and events >= leave_after:
                error = None
                break
    except (OSError, TimeoutError, ValueError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    finally:
        if writer is not None:
            # Left as a client that dies leaves, without a goodbye.
            writer.transport.abort()
    return Answer(first, longest, events, counted or events, "".join(said), error)


class Server:
    """A server in a process group of its own; it is stopped at the end of a `with` block.

    Args:
        name: in tables.
        command: starts it; `{port}` stands for the port.
        ready: path that answers 200 once it serves.
        environment: added to ours.
        seconds: in which it must be ready.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        ready: str = "/v1/models",
        environment: dict[str, str] | None = None,
        seconds: float = 300.0,
    ) -> None:
        self.name = name
        self.port = _free_port()
        self.log = tempfile.NamedTemporaryFile(prefix=f"{name}-", suffix=".log", delete=False)  # noqa: SIM115
        self.process = subprocess.Popen(
            [part.replace("{port}", str(self.port)) for part in command],
            stdout=self.log,
            stderr=self.log,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        self.ready = ready
        self.seconds = seconds

    def __enter__(self) -> Self:
        deadline = time.monotonic() + self.seconds
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise SystemExit(f"error: {self.name} does not serve; see {self.log.name}")
            with contextlib.suppress(OSError, urllib.error.URLError):
                self.get(self.ready)
                return self
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.thaw()
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.log.close()

    def get(self, path: str) -> Any:
        """What a route answers, as JSON."""
        with urllib.request.urlopen(f"http://{HOST}:{self.port}{path}", timeout=10) as answer:
            return json.loads(answer.read())

    def freeze(self) -> None:
        """Take it from the processor while others are measured."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.killpg(self.process.pid, signal.SIGCONT)


def plait_server(*flags: str, threads: int = 2) -> Server:
    """`plait serve` with SmolLM2."""
    command = [sys.executable, "-c", "from plait.cli import main; main()", "serve", "--port", "{port}"]
    environment = {"PLAIT_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    return Server("plait", [*command, *flags], ready="/health", environment=environment)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])
