"""Models of the Hugging Face hub, against a stand-in on loopback and the real `huggingface_hub`."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_server import COMMIT, HubServer
from huggingface_hub import constants, file_download
from index_server import IndexServer, Pinned, pin_alias, running

from plait.errors import CapacityError, DownloadError, MissingExtraError, UnknownNameError
from plait.hub import cached_models, remove, resolve
from plait.hub.huggingface import counting_bar

MODEL = bytes(range(256)) * 40
FILES = {
    "config.json": b"{}",
    "model-1.safetensors": MODEL,
    "model-2.safetensors": MODEL[::-1],
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "tokenizer.model": b"pieces",
    "merges.txt": b"a b",
    "pytorch_model.bin": b"pickle",
    "training_args.bin": b"pickle",
    "modeling_custom.py": b"import os",
    "README.md": b"# Model",
    "original/consolidated.safetensors": MODEL,
    "../outside.json": b"{}",
    "m.Q4.gguf": MODEL[:500],
    "deep/m.Q8.gguf": MODEL[:900],
}
TAKEN = {
    "config.json",
    "model-1.safetensors",
    "model-2.safetensors",
    "model.safetensors.index.json",
    "tokenizer.model",
    "merges.txt",
}


@pytest.fixture
def serve(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, bytes]], HubServer]]:
    """Start a hub that has the repository owner/name with some files."""
    started = []

    def start(files: dict[str, bytes]) -> HubServer:
        server = HubServer("owner/name", files)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        context = running(server)
        context.__enter__()
        started.append(context)
        return server

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    yield start
    for context in started:
        context.__exit__(None, None, None)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_folder_has_data_files_only(
    cache: Path, serve: Callable[[dict[str, bytes]], HubServer], capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(FILES)
    path = resolve("owner/name")
    assert path == cache / "hub/owner/name/main/folder"
    assert names(path) == TAKEN == server.sent()
    assert all((path / name).read_bytes() == FILES[name] for name in TAKEN)
    assert not list((cache / "partial").iterdir())
    assert capsys.readouterr() == ("", "")


def test_second_call_makes_no_request(serve: Callable[[dict[str, bytes]], HubServer]) -> None:
    server = serve(FILES)
    path = resolve("owner/name")
    asked = len(server.requests)
    assert resolve("owner/name@main") == path
    assert len(server.requests) == asked


def test_one_chosen_file(cache: Path, serve: Callable[[dict[str, bytes]], HubServer]) -> None:
    server = serve(FILES)
    path = resolve("owner/name@v1:deep/m.Q8.gguf")
    assert path == cache / "hub/owner/name/v1/files/deep/m.Q8.gguf"
    assert path.read_bytes() == MODEL[:900]
    assert server.sent() == {"deep/m.Q8.gguf"}
    assert not list((cache / "partial").iterdir())
    assert [model.name for model in cached_models()] == ["owner/name@v1:deep/m.Q8.gguf"]
    assert remove("owner/name@v1:deep/m.Q8.gguf") == 900


class Recorder:
    def __init__(self) -> None:
        self.total = 0
        self.steps: list[int] = []

    def start(self, total_bytes: int, label: str) -> None:
        self.total = total_bytes

    def advance(self, n: int) -> None:
        self.steps.append(n)

    def finish(self) -> None:
        self.steps.append(0)


def test_progress_adds_up(serve: Callable[[dict[str, bytes]], HubServer]) -> None:
    serve(FILES)
    recorder = Recorder()
    resolve("owner/name", progress=recorder)
    assert recorder.total == sum(recorder.steps) == sum(len(FILES[name]) for name in TAKEN)
    assert recorder.steps[-1] == 0


def test_bars_of_one_file_are_counted_once() -> None:
    steps: list[int] = []
    bar = counting_bar(huggingface_hub, 100, steps.append)
    received, written = bar(total=100), bar(total=100)
    received.update(60)
    written.update(30)
    bar(total=100, initial=70).update(20)
    written.update(900)
    assert steps == [60, 30, 10]


@pytest.mark.parametrize("name", ["model-2.safetensors", "config.json"])
def test_download_that_failed_goes_on(
    serve: Callable[[dict[str, bytes]], HubServer], cache: Path, name: str
) -> None:
    server = serve(FILES)
    kept = server.files.pop(name)
    listing = server.listing()
    listing["siblings"].append(  # type: ignore[attr-defined]
        {"rfilename": name, "size": len(kept), "blobId": "0" * 40}
    )
    server.listing = lambda: listing  # type: ignore[method-assign]
    with pytest.raises(DownloadError, match="Run the same command again"):
        resolve("owner/name")
    assert not (cache / "hub").exists()
    assert cached_models() == []
    fetched = server.sent() - {name}
    server.files[name] = kept
    server.requests.clear()
    assert names(resolve("owner/name")) == TAKEN
    assert not server.sent() & fetched


def test_file_with_another_hash_is_deleted(
    cache: Path, serve: Callable[[dict[str, bytes]], HubServer]
) -> None:
    server = serve(FILES)
    server.damaged = {"model-1.safetensors"}
    with pytest.raises(DownloadError, match=r"model-1\.safetensors of owner/name is not the file"):
        resolve("owner/name")
    assert not (cache / "hub").exists()
    server.damaged = set()
    assert (resolve("owner/name") / "model-1.safetensors").read_bytes() == MODEL


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/other", "no public model 'owner/other', and there is no such folder here"),
        ("owner/name@dev", "no revision 'dev'"),
        (
            "owner/name:m.Q5.gguf",
            r"no file 'm\.Q5\.gguf'\. Did you mean 'm\.Q4\.gguf'\? .*: deep/m\.Q8\.gguf, m\.Q4",
        ),
        ("owner/name--x", "no public model"),
    ],
)
def test_what_the_hub_does_not_have_is_named(
    cache: Path, serve: Callable[[dict[str, bytes]], HubServer], name: str, message: str
) -> None:
    serve(FILES)
    with pytest.raises(UnknownNameError, match=message):
        resolve(name)
    assert cached_models() == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a.gguf": b"", "b.gguf": b"", "config.json": b"{}"},
            r"such as owner/name:a\.gguf\. It has: a\.gguf, b\.gguf",
        ),
        ({"pytorch_model.bin": b"", "config.json": b"{}"}, "other weights are never loaded"),
        ({}, "other weights are never loaded"),
    ],
)
def test_repository_without_safetensors_says_what_it_has(
    serve: Callable[[dict[str, bytes]], HubServer], files: dict[str, bytes], message: str
) -> None:
    server = serve(files)
    with pytest.raises(UnknownNameError, match=message):
        resolve("owner/name")
    assert server.sent() == set()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ((403, "GatedRepo"), "is gated. Accept its terms"),
        ((500, ""), "The Hugging Face hub failed for owner/name: .*500"),
        ((418, ""), "The Hugging Face hub failed for owner/name: .*418"),
    ],
)
def test_refusals_say_what_to_do(
    serve: Callable[[dict[str, bytes]], HubServer], error: tuple[int, str], message: str
) -> None:
    serve(FILES).error = error
    with pytest.raises(DownloadError, match=message):
        resolve("owner/name")


def test_unreachable_hub_is_an_error_of_ours(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(DownloadError, match="The Hugging Face hub failed for owner/name"):
        resolve("owner/name")


def test_hub_without_a_commit_is_refused(serve: Callable[[dict[str, bytes]], HubServer]) -> None:
    server = serve(FILES)
    listing = server.listing() | {"sha": "../.."}
    server.listing = lambda: listing  # type: ignore[method-assign]
    with pytest.raises(DownloadError, match="names no commit"):
        resolve("owner/name")


def test_full_disk_is_told(
    serve: Callable[[dict[str, bytes]], HubServer], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    serve(FILES)

    def full(*args: Any, **kwargs: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(CapacityError, match="Free some space"):
        resolve("owner/name")
    assert not (cache / "hub").exists()


def test_missing_extra_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'plait\[hub\]'"):
        resolve("owner/name")


# The hub as the second source of an alias


def tiny(repo: str = "owner/name") -> Pinned:
    return pin_alias("tiny", MODEL[:500], hub=f"{repo}@{COMMIT}:m.Q4.gguf")


def test_alias_falls_back_to_its_pinned_file(
    cache: Path,
    index: IndexServer,
    register: Callable[[Pinned], None],
    serve: Callable[[dict[str, bytes]], HubServer],
) -> None:
    serve(FILES)
    pinned = tiny()
    register(pinned)
    part = cache / "partial" / f"{pinned.alias.wheels[0].sha256}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"begun")
    path = resolve("tiny")
    assert path == cache / "models/tiny/huggingface/tiny.gguf"
    assert path.read_bytes() == MODEL[:500]
    assert [(model.name, model.source) for model in cached_models()] == [("tiny", "huggingface")]
    assert not part.exists()
    asked = len(index.requests)
    assert resolve("tiny") == path
    assert len(index.requests) == asked
    assert remove("tiny") == 500


@pytest.mark.parametrize("content", [b"x" * 500, b"x" * 501])
def test_file_on_the_hub_must_be_the_pinned_one(
    cache: Path,
    index: IndexServer,
    register: Callable[[Pinned], None],
    serve: Callable[[dict[str, bytes]], HubServer],
    content: bytes,
) -> None:
    server = serve(FILES | {"m.Q4.gguf": content})
    register(tiny())
    with pytest.raises(
        DownloadError, match=r"answered 404.* The second source failed too: .*(pinned|expected)"
    ):
        resolve("tiny")
    # A wrong size is known before the download, other content only after it.
    assert server.sent() == ({"m.Q4.gguf"} if len(content) == 500 else set())
    assert cached_models() == []


def test_both_sources_are_named_when_both_fail(
    index: IndexServer, register: Callable[[Pinned], None], serve: Callable[[dict[str, bytes]], HubServer]
) -> None:
    serve(FILES)
    register(tiny("owner/gone"))
    with pytest.raises(DownloadError, match=r"answered 404.*second source failed too: .*owner/gone"):
        resolve("tiny")


def test_missing_extra_does_not_hide_the_first_failure(
    index: IndexServer, register: Callable[[Pinned], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    register(tiny())
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match=r"answered 404.*pip install 'plait\[hub\]'"):
        resolve("tiny")
