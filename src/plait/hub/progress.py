"""How far a download is: a protocol for callers, and a bar for terminals."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

__all__ = ["Progress", "RichProgress", "reporting"]


class Progress(Protocol):
    """What `resolve` tells while it downloads.

    Each download is `start`, any number of `advance`, then `finish`, also when it fails. A second
    download follows when the first source fails and there is another.
    """

    def start(self, total_bytes: int, label: str) -> None:
        """A download of `total_bytes` begins; `label` says what and from where."""
        ...

    def advance(self, n: int) -> None:
        """`n` more bytes are here; negative when a server makes us begin a file again."""
        ...

    def finish(self) -> None:
        """The download ended, well or not."""
        ...


class RichProgress:
    """A bar on stderr when stderr is a terminal, else nothing."""

    def __init__(self) -> None:
        self._bar: Bar | None = None

    def start(self, total_bytes: int, label: str) -> None:
        # Asked of the stream itself: rich takes FORCE_COLOR for a terminal.
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._bar.add_task(label, total=total_bytes)

    def advance(self, n: int) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=n)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@contextmanager
def reporting(progress: Progress | None, total_bytes: int, label: str) -> Iterator[Callable[[int], None]]:
    """Start `progress`, yield its `advance`, and finish it however the block ends."""
    if progress is None:
        yield lambda n: None
        return
    progress.start(total_bytes, label)
    try:
        yield progress.advance
    finally:
        progress.finish()
