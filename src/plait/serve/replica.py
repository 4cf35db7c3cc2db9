"""One of several replicas, as a process: `python -m plait.serve.replica NUMBER`, with settings as a line of JSON.

It writes `ready PORT` to standard output once it serves, and ends when its standard input does, so that none is
left over when the front is killed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from plait.engine import load
from plait.serve.app import create_app
from plait.serve.logs import set_up_logging
from plait.serve.runner import bind, serve_app
from plait.serve.settings import Settings

__all__ = ["main"]


def main() -> None:
    """Serve until the front goes away."""
    settings = Settings.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_end_with_the_front, daemon=True).start()
    set_up_logging(settings.log_format)
    lm = load(
        settings.model,
        weights=settings.weights,
        memory=settings.memory,
        draft=settings.draft,
        draft_model=settings.draft_model,
        offline=settings.offline or None,
    )
    with bind(settings) as listener:
        app = create_app(lm, settings, replica=int(sys.argv[1]))
        serve_app(app, listener, settings, lambda _: _say_ready(listener.getsockname()[1]))


def _say_ready(port: int) -> None:
    sys.stdout.write(f"ready {port}\n")
    sys.stdout.flush()


def _end_with_the_front() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
