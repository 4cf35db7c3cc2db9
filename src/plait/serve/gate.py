"""What every request passes before anything reads it: host, origin, key, size, time, form.

A pure ASGI layer, so that a body is bounded before it is parsed and a stream is not held back.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plait.serve.errors import HTTPError, error_of, refusal
from plait.serve.keys import Keys
from plait.serve.logs import log_event, logger
from plait.serve.settings import Settings

__all__ = ["Gate", "json_depth"]

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
_PREFLIGHT: Message = {
    "type": "http.response.start",
    "status": 204,
    "headers": [
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-allow-headers", b"authorization, content-type, x-api-key"),
    ],
}
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "testserver")


class Gate:
    """Lets in what may come in, and writes one log line for each request.

    Args:
        app: what lies behind.
        settings: of the server.
        keys: of the server.
    """

    def __init__(self, app: ASGIApp, settings: Settings, keys: Keys) -> None:
        self.app = app
        self.settings = settings
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return
        begun = time.monotonic()
        request_id = uuid.uuid4().hex[:16]
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        state = scope.setdefault("state", {})
        state["log"] = {}
        answer = _Answer(send, request_id, headers.get("origin") if self._is_allowed(headers) else None)
        try:
            if _is_preflight(scope, headers) and self._is_allowed(headers):
                await answer(_PREFLIGHT)
                await answer({"type": "http.response.body", "body": b""})
                return
            tenant = self._admit(scope, headers)
            state["tenant"] = tenant
            body = await self._body(scope, headers, receive)
            await self.app(scope, _replay(body, receive), answer)
        except (HTTPError, ValueError) as error:
            await self._refuse(error_of(error), scope, receive, answer)
        except asyncio.CancelledError:
            answer.status = answer.status or 499
            raise
        except Exception as error:  # noqa: BLE001 - the client is told, and the next request works
            logger.exception("error", extra={"fields": {"request": request_id, "path": scope["path"]}})
            await self._refuse(error_of(error), scope, receive, answer)
        finally:
            log_event(
                "request",
                request=request_id,
                method=scope["method"],
                path=scope["path"],
                status=answer.status,
                seconds=round(time.monotonic() - begun, 4),
                **state["log"],
            )

    async def _refuse(self, error: HTTPError, scope: Scope, receive: Receive, answer: _Answer) -> None:
        if not answer.status:
            # What is left of the body is not read, so the connection cannot go on.
            answer.closes = True
            await refusal(error)(scope, receive, answer)

    def _admit(self, scope: Scope, headers: dict[str, str]) -> str:
        """The tenant of a request.

        Raises:
            HTTPError: a foreign host or origin, or a wrong or missing key.
        """
        if not self.keys.are_set and _host(headers.get("host", "")) not in (*_LOOPBACK, self.settings.host):
            # A web page whose name was bound to this machine's address must not get in by the reader's browser.
            raise HTTPError(
                403, "This server answers to the name of this machine only, as long as it has no API key."
            )
        origin = headers.get("origin")
        if origin is not None and not self._is_allowed(headers):
            raise HTTPError(403, "Pages of this origin may not call the server. Add it to allowed_origins.")
        tenant = self.keys.tenant(headers)
        if tenant is None and not _is_open(scope):
            raise HTTPError(
                401,
                "The API key is missing or wrong. Send it as: Authorization: Bearer KEY",
                code="invalid_api_key",
            )
        return tenant or ""

    def _is_allowed(self, headers: dict[str, str]) -> bool:
        """Whether the page that calls lies on this server, or on an allowed origin."""
        origin = headers.get("origin", "")
        own = origin.partition("://")[2]
        return bool(origin) and (own == headers.get("host") or origin in self.settings.allowed_origins)

    async def _body(self, scope: Scope, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole body.

        Raises:
            HTTPError: it is too large, too slow, too deep, not UTF-8 or not JSON by name.
        """
        most = self.settings.max_body_bytes
        declared = headers.get("content-length", "0")
        if not declared.isdigit() or int(declared[:20]) > most:
            raise HTTPError(413, f"A body has at most {most} bytes. Got {declared[:20]}.")
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise HTTPError(400, "The client went away before its body was complete.")
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > most:
                        raise HTTPError(413, f"A body has at most {most} bytes. This one is longer.")
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            seconds = self.settings.body_seconds
            raise HTTPError(408, f"The body did not arrive within {seconds:g} seconds.") from None
        body = b"".join(chunks)
        if body:
            _check_json(body, headers, self.settings.max_json_depth)
        return body


class _Answer:
    """The way back: notes the status, and adds the headers that every response has."""

    def __init__(self, send: Send, request_id: str, origin: str | None) -> None:
        self.send = send
        self.request_id = request_id
        self.origin = origin
        self.status = 0
        self.closes = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            added = [
                (b"x-request-id", self.request_id.encode()),
                (b"x-content-type-options", b"nosniff"),
            ]
            if self.origin is not None:
                added += [
                    (b"access-control-allow-origin", self.origin.encode("latin-1")),
                    (b"vary", b"Origin"),
                ]
            if self.closes:
                added.append((b"connection", b"close"))
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await self.send(message)


def json_depth(body: bytes) -> int:
    """How deep brackets nest in a JSON text, those in strings left out."""
    depth = deepest = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", body)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _check_json(body: bytes, headers: dict[str, str], max_depth: int) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPError(415, f"A body must be application/json. Got {kind or 'no content type'}.")
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HTTPError(400, f"The body is not UTF-8 text: byte {error.start} is wrong.") from None
    depth = json_depth(body)
    if depth > max_depth:
        raise HTTPError(400, f"A body nests at most {max_depth} deep. This one nests {depth} deep.")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give the body that was read, then what comes behind it, which is that the client goes away."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    name, colon, port = header.rpartition(":")
    return (name if colon and port.isdigit() else header).lower()


def _is_preflight(scope: Scope, headers: dict[str, str]) -> bool:
    """Whether a browser asks if a page may call; it sends no key with that."""
    return scope["method"] == "OPTIONS" and "access-control-request-method" in headers


def _is_open(scope: Scope) -> bool:
    """Whether a route needs no key: health, and the files of the page, which hold no data of anybody."""
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (
        path in ("/health", "/") or path.startswith("/playground/")
    )
