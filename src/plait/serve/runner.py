"""Running a server: the address, the process, and its end."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from plait.engine import LanguageModel
from plait.errors import ConfigError, PlaitError
from plait.serve.app import create_app
from plait.serve.logs import log_event, set_up_logging
from plait.serve.settings import Settings

__all__ = ["bind", "run", "serve_app", "serving", "url_of"]


def bind(settings: Settings) -> socket.socket:
    """Take the address before anything else is done, so that a mistake shows at once.

    Raises:
        ConfigError: it is in use, or not an address of this machine.
    """
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Listening also finds out whether another socket that shares the address was there first.
        listener.listen(1024)
    except OSError as error:
        if listener is not None:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {settings.port} of {settings.host} is in use. Choose another with --port, or 0 for a free one."
            ) from None
        raise ConfigError(
            f"{settings.host}:{settings.port} cannot be listened on: {error.strerror}."
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a listening socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(load: Callable[[], LanguageModel], settings: Settings, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then finish what was begun within `drain_seconds`.

    Args:
        load: brings the model, once the address is taken.
        settings: of the server.
        say: told, in lines for people, how to reach the server.

    Raises:
        ConfigError: the address cannot be taken.
        PlaitError: the model cannot be loaded.
    """
    listener = bind(settings)
    with listener:
        set_up_logging(settings.log_format)
        app = create_app(load(), settings)
        serve_app(app, listener, settings, say)


def serve_app(
    app: Any,
    listener: socket.socket,
    settings: Settings,
    say: Callable[[str], None],
) -> None:
    """Run an application on a listening socket until a signal comes."""
    server = _Server(_config(app, settings))
    server.when_ready = lambda: say(f"Listening on {url_of(listener)}. Ctrl-C ends.")
    # A signal that ended the server is not raised again: ending is what was asked for.
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    log_event("ended")
    if not server.has_started:
        raise PlaitError("The server did not start; its log says why.")


@contextlib.contextmanager
def serving(
    lm: LanguageModel, settings: Settings | None = None, *, listener: socket.socket | None = None
) -> Iterator[str]:
    """Serve a model from a thread of this process for as long as a `with` block runs.

    Example:
        >>> with serving(plait.load("smollm2")) as url:  # doctest: +SKIP
        ...     client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")

    Args:
        lm: the model; used by nobody else meanwhile.
        settings: of the server; any free port when left out.
        listener: a socket that listens, in place of the address of the settings; it stays the caller's.

    Yields:
        The address, such as `http://127.0.0.1:40123`.

    Raises:
        ConfigError: the address cannot be taken.
        PlaitError: the server does not start; its log says why.
    """
    settings = settings or Settings(port=0)
    with contextlib.ExitStack() as stack:
        listener = listener or stack.enter_context(bind(settings))
        server = uvicorn.Server(_config(create_app(lm, settings), settings))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise PlaitError("The server did not start; its log says why.")
                time.sleep(0.01)
            yield url_of(listener)
        finally:
            server.should_exit = True
            thread.join()


def _config(app: Any, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
        timeout_keep_alive=15,
        h11_max_incomplete_event_size=65536,
        ws="none",
        lifespan="on",
    )


class _Server(uvicorn.Server):
    """Says when it answers, and ends with success on a signal."""

    when_ready: Callable[[], None]
    has_started = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.has_started = True
            self.when_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            # uvicorn raises what it has captured once more, which would end the process with a failure.
            self._captured_signals.clear()
