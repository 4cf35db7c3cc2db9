"""Writing files so that a crash, a kill or a full disk leaves the old file or none, never half of one."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from plait.errors import CapacityError, DownloadError

__all__ = [
    "CHUNK",
    "FULL_DISK",
    "Output",
    "disk_errors",
    "file_size",
    "full_disk",
    "make_folder",
    "replacing",
    "sha256_of",
    "sync_file",
    "sync_folder",
    "temporary_of",
]

CHUNK = 1 << 18
"""Bytes read, hashed or written at a time."""
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def full_disk(path: Path) -> CapacityError:
    """The error for a disk or a quota that is full."""
    return CapacityError(
        f"No space left on the disk while writing {path}. Free some space, or set PLAIT_CACHE to a folder"
        " on another disk, and run the same command again."
    )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say what to do about a full disk or a folder that cannot be written.

    Raises:
        CapacityError: the disk or the quota is full.
        DownloadError: any other OSError in the block.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise full_disk(path) from error
        raise DownloadError(
            f"Cannot write {path}: {error.strerror or error}. Set PLAIT_CACHE to a folder that can be written."
        ) from error


def make_folder(folder: Path) -> Path:
    """Make the folder and its parents if they are not there; return it."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def sync_folder(folder: Path) -> None:
    """Make renames inside the folder survive a power cut, where the system can."""
    if os.name == "nt":  # folders cannot be opened there
        return
    with disk_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make what another program wrote survive a power cut."""
    with disk_errors(path), path.open("r+b") as stream:
        os.fsync(stream.fileno())


def file_size(path: Path) -> int:
    """Size of a regular file in bytes, or -1 when there is none."""
    try:
        status = path.stat()
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def sha256_of(path: Path) -> str:
    """Hash of a file, in lower-case hexadecimal."""
    with disk_errors(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Output:
    """A file that is appended to; `size` is always what the file holds.

    Args:
        path: the file, made with its folder if it is not there.
        keep: go on after what the file already holds, instead of emptying it.
    """

    size: int

    def __init__(self, path: Path, *, keep: bool) -> None:
        self.path = path
        make_folder(path.parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        with disk_errors(path):
            self._descriptor = os.open(path, flags if keep else flags | os.O_TRUNC, 0o666)
        self.size = os.fstat(self._descriptor).st_size

    def write(self, data: bytes) -> None:
        """Append all of `data`."""
        rest = memoryview(data)
        with disk_errors(self.path):
            while rest:
                written = os.write(self._descriptor, rest)
                self.size += written
                rest = rest[written:]

    def clear(self) -> None:
        """Empty the file."""
        with disk_errors(self.path):
            os.ftruncate(self._descriptor, 0)
        self.size = 0

    def sync(self) -> None:
        """Wait until the bytes are on the disk."""
        with disk_errors(self.path):
            os.fsync(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


def temporary_of(path: Path) -> Path:
    """Where a file is written before it takes its name."""
    return path.with_name(path.name + ".tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Output]:
    """Write a file that appears under `path` whole, when the block ends without an error.

    The bytes go to `<path>.tmp` in the same folder, so the caller must hold a lock for `path`.
    """
    temporary = temporary_of(path)
    try:
        with Output(temporary, keep=False) as output:
            yield output
            output.sync()
        with disk_errors(path):
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)
