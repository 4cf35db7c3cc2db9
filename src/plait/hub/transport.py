"""Requests over the network: which addresses are allowed, time-outs, redirects, retries, resumption."""

from __future__ import annotations

import base64
import ipaddress
import re
import time
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPException, HTTPMessage
from typing import IO, Any, NamedTuple, TypeVar
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit

from plait.errors import DownloadError
from plait.hub import files
from plait.hub.files import Output

__all__ = ["Link", "Page", "download", "get_page", "is_allowed"]

TIMEOUT = 30.0
"""Seconds to wait for a connection, and for each next piece of an answer."""
ATTEMPTS = 4
FIRST_WAIT = 0.5
MAX_WAIT = 30.0
"""Seconds before the second attempt, doubled each time, and the longest wait a server may ask for."""
PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

Result = TypeVar("Result")


class TransientError(Exception):
    """A fault that may pass: the request is tried again after `wait` seconds at least."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class RangeRefusedError(TransientError):
    """The server has no bytes from where we are."""


class Link(NamedTuple):
    """An address, and the `Authorization` header that goes to its host only."""

    url: str
    authorization: str | None = None

    @classmethod
    def parse(cls, url: str) -> Link:
        """Take a user name and password out of an address, so that no message shows them."""
        parts = urlsplit(url)
        account, at, host = parts.netloc.rpartition("@")
        if not at:
            return cls(url)
        token = base64.b64encode(unquote(account).encode()).decode()
        return cls(urlunsplit(parts._replace(netloc=host)), f"Basic {token}")

    def to(self, url: str) -> Link:
        """A link found behind this one; it keeps the authorization on the same host."""
        return Link(url, self.authorization if _origin(url) == _origin(self.url) else None)

    def __str__(self) -> str:
        # A query may hold a signature.
        return urlunsplit(urlsplit(self.url)._replace(query="", fragment=""))


class Page(NamedTuple):
    """A small document, and where it was after redirects."""

    body: bytes
    content_type: str
    link: Link


def is_allowed(url: str, *, referrer: str | None = None) -> bool:
    """Whether an address may be opened: https, or a local file, or http on this machine.

    What a page or a redirect at `referrer` points to may not be more local than the page itself:
    a web page never leads to a file, and only this machine leads to http on this machine. Nor may
    it hold a password; those come from the user.
    """
    if not (url.isascii() and url.isprintable()) or " " in url:
        return False
    try:
        parts = urlsplit(url)
        host, origin = parts.hostname or "", urlsplit(referrer) if referrer else None
        _ = parts.port  # raises when it is not a number
    except ValueError:
        return False
    if origin is not None and "@" in parts.netloc:
        return False
    match parts.scheme:
        case "https":
            return bool(host)
        case "http":
            return _is_loopback(host) and (origin is None or origin.scheme in ("http", "file"))
        case "file":
            return host in ("", "localhost") and (origin is None or origin.scheme == "file")
    return False


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


class _Redirects(request.HTTPRedirectHandler):
    max_redirections = 5

    def redirect_request(
        self, req: request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> request.Request | None:
        # The base class reads the body of the redirect to its end, and it may have none.
        fp.close()
        if not is_allowed(newurl, referrer=req.full_url):
            raise DownloadError(
                f"{Link(req.full_url)} redirects to {Link.parse(newurl)}, which is not allowed. Only https is,"
                " or http from this machine to itself. Check PLAIT_INDEX_URL."
            )
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        authorization = req.unredirected_hdrs.get("Authorization")
        if following is not None and authorization and _origin(newurl) == _origin(req.full_url):
            following.add_unredirected_header("Authorization", authorization)
        return following


def _open(link: Link, headers: dict[str, str]) -> Any:
    """Open an address that `is_allowed`; the caller closes the answer.

    Raises:
        TransientError: trying again may help.
        DownloadError: it would not.
    """
    # Listed one by one: the default opener also knows ftp and data addresses.
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler(),
        request.HTTPHandler(),
        request.HTTPSHandler(),
        request.FileHandler(),
        request.UnknownHandler(),
        request.HTTPDefaultErrorHandler(),
        request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    asked = request.Request(
        link.url, headers={"User-Agent": "plait", "Accept-Encoding": "identity"} | headers
    )
    if link.authorization:
        asked.add_unredirected_header("Authorization", link.authorization)
    try:
        return opener.open(asked, timeout=TIMEOUT)
    except HTTPError as error:
        with closing(error):  # its body may be closed already
            message = f"{link} answered {error.code} {error.reason}"
            if error.code == 416:
                raise RangeRefusedError(message) from error
            if error.code in PASSING_STATUS:
                raise TransientError(message, _seconds(error.headers.get("Retry-After"))) from error
            raise DownloadError(
                f"{message}. Check the address, or set PLAIT_INDEX_URL to another index."
            ) from error
    except URLError as error:
        reason = error.reason
        if isinstance(reason, FileNotFoundError | IsADirectoryError | PermissionError):
            raise DownloadError(f"Cannot read {link}: {reason.strerror}. Check PLAIT_INDEX_URL.") from error
        raise TransientError(f"Cannot reach {link}: {reason}") from error
    except (OSError, HTTPException) as error:
        raise TransientError(f"Cannot reach {link}: {error or type(error).__name__}") from error
    except ValueError as error:
        raise DownloadError(
            f"{link} redirects to a malformed address ({error}). Check PLAIT_INDEX_URL."
        ) from error


def _seconds(text: str | None) -> float:
    return float(text) if text and re.fullmatch(r"[0-9]{1,6}", text) else 0.0


def _read(response: Any, limit: int, link: Link) -> bytes:
    """The next piece of the body, at most `limit` bytes; empty at its end."""
    try:
        return bytes(response.read1(limit))
    except (OSError, HTTPException) as error:
        raise TransientError(f"The connection to {link} broke: {error or type(error).__name__}") from error


def _retrying(action: Callable[[], Result]) -> Result:
    attempts, wait = 0, FIRST_WAIT
    while True:
        try:
            return action()
        except TransientError as fault:
            attempts += 1
            if attempts == ATTEMPTS:
                raise DownloadError(
                    f"{fault} ({ATTEMPTS} attempts). Run the same command again to go on from here."
                ) from fault
            time.sleep(min(max(wait, fault.wait), MAX_WAIT))
            wait *= 2


def get_page(link: Link, *, accept: str, limit: int) -> Page:
    """Fetch a small document.

    Args:
        link: where it is.
        accept: the `Accept` header.
        limit: most bytes it may have.

    Raises:
        DownloadError: the document is not to be had, or is larger than `limit`.
    """

    def attempt() -> Page:
        with _open(link, {"Accept": accept}) as response:
            body = bytearray()
            while block := _read(response, min(files.CHUNK, limit + 1 - len(body)), link):
                body += block
                if len(body) > limit:
                    raise DownloadError(f"{link} has more than {limit} bytes. Check PLAIT_INDEX_URL.")
            expected = _content_length(response)
            if expected is not None and len(body) < expected:
                raise TransientError(f"{link} ended after {len(body)} of {expected} bytes")
            return Page(bytes(body), response.headers.get_content_type(), link.to(response.url))

    return _retrying(attempt)


def download(link: Link, output: Output, nbytes: int, advance: Callable[[int], None]) -> None:
    """Append to `output` until it has `nbytes`, starting from what it already holds.

    A server that does not know ranges sends the file from its start; then so do we.

    Args:
        link: where the file is.
        output: the file being made.
        nbytes: size of the whole file.
        advance: told how many bytes came, negative when the file starts again.

    Raises:
        DownloadError: the file is not to be had, or is not of that size. What came stays in `output`.
    """

    def restart() -> None:
        advance(-output.size)
        output.clear()

    def attempt() -> None:
        headers = {"Range": f"bytes={output.size}-"} if output.size else {}
        try:
            response = _open(link, headers)
        except RangeRefusedError:
            restart()
            raise
        with response:
            if output.size and not _continues(response, output.size):
                restart()
                if response.status == 206:
                    raise TransientError(f"{link} sent another range than was asked for")
            remaining = nbytes - output.size
            claimed = _content_length(response)
            if claimed is not None and claimed != remaining:
                raise DownloadError(
                    f"{link} has {output.size + claimed} bytes, but {nbytes} are pinned. It is another file;"
                    " set PLAIT_INDEX_URL to another index."
                )
            while block := _read(response, min(files.CHUNK, nbytes + 1 - output.size), link):
                if output.size + len(block) > nbytes:
                    restart()
                    raise DownloadError(
                        f"{link} has more than the {nbytes} bytes that are pinned. It is another file;"
                        " set PLAIT_INDEX_URL to another index."
                    )
                output.write(block)
                advance(len(block))
        if output.size < nbytes:
            raise TransientError(f"{link} ended after {output.size} of {nbytes} bytes")

    if output.size > nbytes:
        output.clear()
    advance(output.size)
    if output.size < nbytes:
        _retrying(attempt)


def _continues(response: Any, start: int) -> bool:
    served = response.headers.get("Content-Range") or ""
    return response.status == 206 and served.startswith(f"bytes {start}-")


def _content_length(response: Any) -> int | None:
    text = response.headers.get("Content-Length") or ""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None
