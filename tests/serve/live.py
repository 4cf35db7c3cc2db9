"""A server on a real socket of this machine, in a thread of the test's process."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn

from plait.engine import LanguageModel
from plait.serve import Settings, create_app
from plait.serve.runner import bind, url_of

__all__ = ["live_server"]


@contextlib.contextmanager
def live_server(
    lm: LanguageModel, settings: Settings | None = None, *, send_buffer: int | None = None
) -> Iterator[str]:
    """The address of a running server; `send_buffer` bytes wait in its sockets for a slow client."""
    settings = settings or Settings(port=0)
    listener = bind(settings)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    app = create_app(lm, settings)
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield url_of(listener)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listener.close()
        assert not thread.is_alive()
