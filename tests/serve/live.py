"""A server on a real socket of this machine, in a thread of the test's process."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from plait.engine import LanguageModel
from plait.serve import Settings, serving
from plait.serve.runner import bind

__all__ = ["live_server"]


@contextlib.contextmanager
def live_server(
    lm: LanguageModel, settings: Settings | None = None, *, send_buffer: int | None = None
) -> Iterator[str]:
    """The address of a running server; `send_buffer` bytes wait in its sockets for a slow client."""
    settings = settings or Settings(port=0)
    with bind(settings) as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        with serving(lm, settings, listener=listener) as url:
            yield url
