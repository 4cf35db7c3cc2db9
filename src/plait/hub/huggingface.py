"""Bringing a model from the Hugging Face hub, through the optional package `huggingface_hub`.

Only files that are data are taken: `*.safetensors`, `*.json` and the tokenizer files at the top of a
repository, or one chosen GGUF file. Weights in other forms may hold code and are never downloaded.
The files gather in `partial` and move to their place together, when all are whole and checked.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from plait.errors import DownloadError, UnknownNameError, import_extra, suggestion
from plait.hub.aliases import Alias
from plait.hub.cache import hub_path, model_path, part_folder
from plait.hub.files import (
    FULL_DISK,
    disk_errors,
    file_size,
    full_disk,
    make_folder,
    sha256_of,
    sync_file,
    sync_folder,
)
from plait.hub.names import HubId, parse_hub_id
from plait.hub.progress import Progress, reporting

__all__ = ["counting_bar", "fetch_alias_from_hub", "fetch_from_hub"]

TIMEOUT = 30.0
COMMIT = re.compile("[0-9a-f]{40}")
WANTED = (
    "*.safetensors",
    "*.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


class Remote(NamedTuple):
    """A file of a repository; the hash is known for large files only."""

    nbytes: int
    sha256: str | None


def fetch_from_hub(hub_id: HubId, progress: Progress | None) -> Path:
    """Download a model of the hub and return its folder, or its one GGUF file.

    The caller holds the lock of the id.

    Raises:
        MissingExtraError: `huggingface_hub` is not installed.
        UnknownNameError: no such repository, revision or file, or nothing in it that may be loaded.
        DownloadError: the hub fails, or sends something else than it lists.
        CapacityError: the disk is full.
    """
    commit, listed = _list(hub_id)
    folder = _gather(hub_id, commit, _choose(hub_id, listed), str(hub_id), progress)
    if hub_id.file is not None:
        return _move(folder, folder / hub_id.file, hub_path(hub_id))
    return _move(folder, folder, hub_path(hub_id))


def fetch_alias_from_hub(alias: Alias, progress: Progress | None) -> Path:
    """Download the model file of an alias from its pinned place on the hub; return its path.

    The caller holds the lock of the alias. Raises what `fetch_from_hub` raises.
    """
    hub_id = parse_hub_id(alias.hub or "")
    assert hub_id is not None, f"alias {alias.name} has no place on the hub"
    assert hub_id.file is not None, f"alias {alias.name} names no file on the hub"
    commit, listed = _list(hub_id)
    pinned = Remote(alias.nbytes, alias.sha256)
    found = _choose(hub_id, listed)[hub_id.file]
    if found.nbytes != pinned.nbytes:
        raise DownloadError(f"{hub_id} has {found.nbytes} bytes on the hub, but {pinned.nbytes} are pinned.")
    folder = _gather(hub_id, commit, {hub_id.file: pinned}, alias.name, progress)
    return _move(folder, folder / hub_id.file, model_path(alias, "huggingface"))


def _list(hub_id: HubId) -> tuple[str, dict[str, Remote]]:
    """The commit that the revision is now, and every file there."""
    with _hub_errors(hub_id) as hub:
        info = hub.HfApi(library_name="plait").model_info(
            hub_id.repo, revision=hub_id.revision, files_metadata=True, timeout=TIMEOUT
        )
        listed = {
            file.rfilename: Remote(file.size or 0, file.lfs.sha256 if file.lfs else None)
            for file in info.siblings or []
        }
    if not COMMIT.fullmatch(info.sha or ""):
        raise DownloadError(f"The Hugging Face hub names no commit for {hub_id}. Check HF_ENDPOINT.")
    return info.sha, listed


def _choose(hub_id: HubId, listed: dict[str, Remote]) -> dict[str, Remote]:
    """The files to download.

    Raises:
        UnknownNameError: there are none; the message lists what could be asked for.
    """
    if hub_id.file is not None:
        if hub_id.file in listed:
            return {hub_id.file: listed[hub_id.file]}
        offered = [name for name in listed if name.endswith(".gguf")]
        raise UnknownNameError(
            f"{hub_id.repo} has no file {hub_id.file!r}.{suggestion(hub_id.file, offered)}"
            f" Its GGUF files: {', '.join(sorted(offered)[:20]) or 'none'}."
        )
    chosen = {
        name: file
        for name, file in listed.items()
        if not set(name) & set("/\\:") and any(fnmatchcase(name, pattern) for pattern in WANTED)
    }
    if any(name.endswith(".safetensors") for name in chosen):
        return chosen
    offered = sorted(name for name in listed if name.endswith(".gguf"))
    if offered:
        raise UnknownNameError(
            f"{hub_id.repo} has no *.safetensors. Choose one of its GGUF files, such as"
            f" {hub_id._replace(file=offered[0])}. It has: {', '.join(offered[:20])}."
        )
    raise UnknownNameError(
        f"{hub_id.repo} has neither *.safetensors nor *.gguf files; other weights are never loaded."
        " Choose another repository."
    )


def _gather(
    hub_id: HubId, commit: str, wanted: dict[str, Remote], label: str, progress: Progress | None
) -> Path:
    """Download the wanted files, and only those, to a folder of `partial`; running again goes on."""
    folder = make_folder(part_folder(str(hub_id)))
    total = sum(file.nbytes for file in wanted.values())
    with reporting(progress, total, f"{label} from the Hugging Face hub") as advance:
        for name, file in wanted.items():
            with _hub_errors(hub_id) as hub:
                hub.hf_hub_download(
                    hub_id.repo,
                    name,
                    revision=commit,
                    local_dir=folder,
                    library_name="plait",
                    tqdm_class=counting_bar(hub, file.nbytes, advance),
                )
            _check(folder / name, file, hub_id)
    return folder


def counting_bar(hub: Any, nbytes: int, advance: Callable[[int], None]) -> Any:
    """A bar that shows nothing and passes on how far one file is.

    The hub may use several bars for one file and may begin again; what counts is the farthest.
    """
    reached = 0

    def reach(count: int) -> None:
        nonlocal reached
        if reached < (count := min(count, nbytes)):
            advance(count - reached)
            reached = count

    class CountingBar(hub.utils.tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})
            self.count = int(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            self.count += int(n or 0)
            reach(self.count)

    return CountingBar


def _check(path: Path, file: Remote, hub_id: HubId) -> None:
    nbytes = file_size(path)
    sha256 = sha256_of(path) if file.sha256 and nbytes == file.nbytes else None
    if nbytes != file.nbytes or sha256 != file.sha256:
        with disk_errors(path):
            path.unlink(missing_ok=True)
        raise DownloadError(
            f"{path.name} of {hub_id.repo} is not the file that was expected ({file.nbytes} bytes"
            f"{f', SHA-256 {file.sha256}' if file.sha256 else ''}); the download was deleted."
            " Run the same command again."
        )


def _move(folder: Path, source: Path, target: Path) -> Path:
    """Move what was gathered to its place, whole; nothing else that is in `folder` stays."""
    make_folder(target.parent)
    with disk_errors(target):
        if source.is_dir():
            # What the hub's package keeps beside the files.
            shutil.rmtree(source / ".cache", ignore_errors=True)
            for file in source.iterdir():
                sync_file(file)
            sync_folder(source)
        else:
            sync_file(source)
        os.replace(source, target)
        sync_folder(target.parent)
        shutil.rmtree(folder, ignore_errors=True)
    return target


@contextmanager
def _hub_errors(hub_id: HubId) -> Iterator[Any]:
    """Yield the package `huggingface_hub`, and turn its errors into ours."""
    hub = import_extra("huggingface_hub", extra="hub", purpose=f"Loading {hub_id} from the Hugging Face hub")
    errors = import_extra("huggingface_hub.errors", extra="hub", purpose="The Hugging Face hub")
    try:
        yield hub
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{hub_id.repo} is gated. Accept its terms on its page of the hub, log in with"
            " `hf auth login`, and run the same command again."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UnknownNameError(
            f"The Hugging Face hub has no public model {hub_id.repo!r}, and there is no such folder here."
            " Check the name; for a private model, log in with `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UnknownNameError(
            f"{hub_id.repo} has no revision {hub_id.revision!r}. Name a branch, tag or commit, or leave it out."
        ) from error
    except (OSError, ValueError, RuntimeError, errors.HTTPError) as error:
        if getattr(error, "errno", None) in FULL_DISK:
            raise full_disk(part_folder(str(hub_id))) from error
        raise DownloadError(
            f"The Hugging Face hub failed for {hub_id}: {error}. Run the same command again to go on from here."
        ) from error
