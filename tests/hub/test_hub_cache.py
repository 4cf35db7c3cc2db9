"""What is in the cache, what a name means, and when the network is left alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from index_server import IndexServer, Publish, cut, pin_alias

from plait.errors import ConfigError, DownloadError, UnknownNameError
from plait.hub import ALIASES, CachedModel, cache_dir, cached_models, pull, remove, resolve
from plait.hub.cache import hub_path, part_folder
from plait.hub.names import HubId, parse_hub_id

MODEL = bytes(range(256)) * 4


# Names


@pytest.mark.parametrize(
    ("text", "hub_id"),
    [
        ("owner/name", HubId("owner/name")),
        ("Owner-1/na.me_2", HubId("Owner-1/na.me_2")),
        ("owner/name@v1.0", HubId("owner/name", "v1.0")),
        ("owner/name@refs/pr/1", HubId("owner/name", "refs/pr/1")),
        ("owner/name:m.gguf", HubId("owner/name", "main", "m.gguf")),
        ("owner/name@dev:sub/m.Q4_1.gguf", HubId("owner/name", "dev", "sub/m.Q4_1.gguf")),
        ("owner/name@main", HubId("owner/name")),
    ],
)
def test_hub_ids_are_read(text: str, hub_id: HubId) -> None:
    assert parse_hub_id(text) == hub_id
    assert parse_hub_id(str(hub_id)) == hub_id


HOSTILE = [
    "",
    "name",
    "../name",
    "owner/..",
    "owner/../x",
    "owner/a..b",
    "/owner/name",
    "owner/name/more",
    "owner//name",
    "-o/name",
    "owner/-name",
    "owner/name@",
    "owner/name@..",
    "owner/name@../x",
    "owner/name@/x",
    "owner/name:",
    "owner/name:../m.gguf",
    "owner/name:/etc/m.gguf",
    "owner/name:m.bin",
    "owner/name:.gguf",
    "owner\\name/x",
    "owner/name\n",
    "owner/na me",
    "owner/name\0",
    "https://example.org/x",
    "owner/name:C:m.gguf",
    "models/model.gguf",
    "models/model.safetensors",
    "x" * 150 + "/" + "y" * 150,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_other_texts_are_no_hub_ids(text: str) -> None:
    assert parse_hub_id(text) is None


@given(
    st.text(alphabet="ab.-_/@:\\ %~", max_size=20) | st.from_regex(r"[\w.]+/[\w.]+(@[\w./]+)?(:[\w./]+gguf)?")
)
def test_a_hub_id_never_leaves_the_cache(text: str) -> None:
    hub_id = parse_hub_id(text)
    if hub_id is not None:
        assert hub_path(hub_id).resolve().is_relative_to(cache_dir().resolve() / "hub")
        assert part_folder(str(hub_id)).resolve().parent == cache_dir().resolve() / "partial"


@pytest.mark.parametrize("text", HOSTILE)
def test_name_that_is_nothing_says_what_is_allowed(cache: Path, text: str) -> None:
    with pytest.raises(
        UnknownNameError, match=r"one of gemma3-270m, smollm2, or a Hugging Face id: owner/name"
    ):
        resolve(text)
    assert not cache.exists()


def test_close_name_is_suggested(cache: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'smollm2'"):
        resolve("smolm2")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_path_that_exists_comes_first(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    local = tmp_path / "smollm2"
    local.write_bytes(MODEL) if kind == "file" else local.mkdir()
    assert resolve("smollm2") == Path("smollm2")
    assert resolve(str(local)) == local
    assert resolve(local) == local
    assert resolve("~/smollm2") == local
    assert not cache.exists()


# Offline


@pytest.mark.parametrize("how", ["argument", "1", "true"])
@pytest.mark.parametrize("name", ["tiny", "owner/name"])
def test_offline_makes_no_request_and_says_how_to_fetch(
    cache: Path, index: IndexServer, publish: Publish, monkeypatch: pytest.MonkeyPatch, how: str, name: str
) -> None:
    publish(pin_alias("tiny", MODEL))
    if how != "argument":
        monkeypatch.setenv("PLAIT_OFFLINE", how)
    with pytest.raises(DownloadError, match=rf"network is switched off .*plait\.hub\.pull\('{name}'\)"):
        resolve(name, offline=True if how == "argument" else None)
    assert index.requests == []
    assert not cache.exists()


def test_offline_finds_what_is_in_the_cache(
    index: IndexServer, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(pin_alias("tiny", MODEL))
    path = resolve("tiny")
    asked = len(index.requests)
    monkeypatch.setenv("PLAIT_OFFLINE", "1")
    assert resolve("tiny") == resolve("tiny", offline=True) == path
    assert len(index.requests) == asked


def test_argument_wins_over_the_variable(publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(pin_alias("tiny", MODEL))
    monkeypatch.setenv("PLAIT_OFFLINE", "1")
    assert resolve("tiny", offline=False).read_bytes() == MODEL


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_offline_can_be_off(publish: Publish, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    publish(pin_alias("tiny", MODEL))
    monkeypatch.setenv("PLAIT_OFFLINE", value)
    assert resolve("tiny").read_bytes() == MODEL


def test_offline_that_is_neither_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_OFFLINE", "perhaps")
    with pytest.raises(ConfigError, match=r"PLAIT_OFFLINE must be 0 or 1\. Got 'perhaps'"):
        resolve("smollm2")


# The folder


def test_cache_is_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLAIT_CACHE", "here")
    assert cache_dir() == tmp_path / "here"
    monkeypatch.setenv("PLAIT_CACHE", "~/there")
    assert cache_dir() == Path.home() / "there"


def test_cache_is_in_the_users_cache_folder_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLAIT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir().name == "plait"
    assert cache_dir().is_relative_to(tmp_path)


def test_cached_models_are_listed_and_removed(cache: Path, publish: Publish) -> None:
    assert cached_models() == []
    for name in ("tiny", "also"):
        publish(pin_alias(name, MODEL))
        resolve(name).with_suffix(".gguf.tmp").write_bytes(b"left by a kill")
    assert cached_models() == [
        CachedModel(name, cache / f"models/{name}/pypi/{name}.gguf", len(MODEL), "pypi")
        for name in ("also", "tiny")
    ]
    assert remove("tiny") == len(MODEL) + len(b"left by a kill")
    assert [model.name for model in cached_models()] == ["also"]
    assert not (cache / "models/tiny").exists()


def test_hub_models_are_listed_and_removed_by_the_name_that_resolves_them(cache: Path) -> None:
    folder, file = HubId("owner/name"), HubId("owner/name", "refs/pr/1", "sub/m.gguf")
    hub_path(folder).mkdir(parents=True)
    (hub_path(folder) / "model.safetensors").write_bytes(b"x" * 10)
    hub_path(file).parent.mkdir(parents=True)
    hub_path(file).write_bytes(b"x" * 7)
    assert cached_models() == [
        CachedModel("owner/name", hub_path(folder), 10, "huggingface"),
        CachedModel("owner/name@refs/pr/1:sub/m.gguf", hub_path(file), 7, "huggingface"),
    ]
    for model in cached_models():
        assert resolve(model.name) == model.path
    assert remove("owner/name@main") == 10
    assert remove("owner/name@refs/pr/1:sub/m.gguf") == 7
    assert cached_models() == []
    assert not (cache / "hub").exists()


def test_unfinished_download_is_not_listed_but_removed(
    cache: Path, index: IndexServer, publish: Publish
) -> None:
    pinned = publish(pin_alias("tiny", MODEL))
    index.ranges = False
    index.faults[f"/files/{pinned.alias.wheels[0].filename}"] = [cut(70)] * 4
    with pytest.raises(DownloadError):
        resolve("tiny")
    assert cached_models() == []
    assert remove("tiny") == 70
    assert not (cache / "partial").exists()


@pytest.mark.parametrize("name", ["tiny", "", "..", "../x", "owner/name", "models"])
def test_name_that_is_not_in_the_cache_cannot_be_removed(cache: Path, publish: Publish, name: str) -> None:
    publish(pin_alias("also", MODEL))
    path = resolve("also")
    with pytest.raises(UnknownNameError, match=r"is not in the cache .* There: also"):
        remove(name)
    assert path.read_bytes() == MODEL


# Progress


def test_pull_draws_on_a_terminal_only(publish: Publish, capsys: pytest.CaptureFixture[str]) -> None:
    publish(pin_alias("tiny", MODEL))
    assert pull("tiny").read_bytes() == MODEL
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are a Unix feature")
def test_pull_draws_on_stderr_of_a_terminal(
    publish: Publish, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

    publish(pin_alias("tiny", MODEL))
    ours, theirs = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with open(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        pull("tiny")
    drawn = os.read(ours, 65536).decode()
    os.close(ours)
    assert "tiny from the package index" in drawn
    assert "100%" in drawn or "bytes" in drawn
    assert capsys.readouterr().out == ""


# The real thing


@pytest.mark.model
def test_smollm2_resolves_through_the_default_cache() -> None:
    alias = ALIASES["smollm2"]
    path = resolve("smollm2")
    assert path.name == alias.filename
    assert path.stat().st_size == alias.nbytes
    with path.open("rb") as stream:
        assert stream.read(4) == b"GGUF"
    assert resolve("smollm2", offline=True) == path
