"""A package index on loopback, with pinned wheels made on the spot and faults on demand."""

from __future__ import annotations

import contextlib
import hashlib
import html
import io
import json
import threading
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

from plait.hub import Alias, Wheel


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def contents(cache: Path) -> dict[str, bytes]:
    """Every file in the cache but the locks."""
    files = (path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in files}


def zip_of(members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def pin(project: str, member: str, content: bytes, wheel: bytes | None = None) -> tuple[Wheel, bytes]:
    """A pinned wheel with one wanted member; `wheel` overrides the bytes that are pinned and served."""
    package = project.replace("-", "_")
    if wheel is None:
        wheel = zip_of({f"{package}/__init__.py": b"", member: content})
    pinned = Wheel(
        project=project,
        filename=f"{package}-1.0-py3-none-any.whl",
        nbytes=len(wheel),
        sha256=sha256(wheel),
        member=member,
        member_nbytes=len(content),
        member_sha256=sha256(content),
    )
    return pinned, wheel


class Pinned(NamedTuple):
    """An alias, the model it stands for, and the wheels that hold it by file name."""

    alias: Alias
    model: bytes
    wheels: dict[str, bytes]


def pin_alias(name: str, *parts: bytes, hub: str | None = None) -> Pinned:
    """An alias of which the model is `parts` joined, each in a wheel of its own."""
    made = [
        pin(f"{name}-part{number}", f"{name}/model.part{number}", content)
        for number, content in enumerate(parts)
    ]
    return pin_alias_of(
        name, [wheel for wheel, _ in made], [content for _, content in made], b"".join(parts), hub
    )


def pin_alias_of(
    name: str, wheels: list[Wheel], contents: list[bytes], model: bytes, hub: str | None = None
) -> Pinned:
    alias = Alias(
        name=name,
        description="A model made by a test",
        licence="none",
        filename=f"{name}.gguf",
        nbytes=len(model),
        sha256=sha256(model),
        wheels=tuple(wheels),
        hub=hub,
    )
    return Pinned(
        alias, model, {wheel.filename: content for wheel, content in zip(wheels, contents, strict=True)}
    )


Publish = Callable[[Pinned], Pinned]


class Request(NamedTuple):
    path: str
    headers: Mapping[str, str]


class IndexServer(ThreadingHTTPServer):
    """Serves `/simple/<project>/` and `/files/<wheel>`.

    `ranges` says whether it knows the Range header; `style` is the form of the index pages.
    `faults[path]` is a list of functions that answer the next requests for that path instead.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.listed: dict[str, Wheel] = {}
        self.file_host = ""
        self.ranges = True
        self.style = "json"
        self.requests: list[Request] = []
        self.faults: dict[str, list[Callable[[_Handler], None]]] = defaultdict(list)
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def serve(self, pinned: Pinned) -> None:
        self.files |= pinned.wheels
        self.listed |= {wheel.filename: wheel for wheel in pinned.alias.wheels}

    def paths(self) -> list[str]:
        return [request.path for request in self.requests]

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: IndexServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests.append(Request(self.path, dict(self.headers.items())))
        faults = self.server.faults[self.path]
        if faults:
            faults.pop(0)(self)
            return
        _, room, name = self.path.split("/")[:3]
        if room == "simple":
            self.send_page(name)
        elif room == "files" and name in self.server.files:
            self.send_file(self.server.files[name])
        else:
            self.answer(404)

    def send_page(self, project: str) -> None:
        wheels = [wheel for wheel in self.server.listed.values() if wheel.project == project]
        if not wheels:
            self.answer(404)
        elif self.server.style == "json":
            page = {
                "meta": {"api-version": "1.1"},
                "name": project,
                "files": [
                    {
                        "filename": wheel.filename,
                        "url": f"{self.server.file_host}/files/{wheel.filename}",
                        "hashes": {"sha256": wheel.sha256},
                    }
                    for wheel in wheels
                ],
            }
            self.answer(
                200, json.dumps(page).encode(), {"Content-Type": "application/vnd.pypi.simple.v1+json"}
            )
        else:
            page = html_page(wheels, f"{self.server.file_host}/files/")
            self.answer(200, page, {"Content-Type": "text/html; charset=utf-8"})

    def send_file(self, content: bytes) -> None:
        start = self.headers.get("Range", "").removeprefix("bytes=").removesuffix("-")
        if not (self.server.ranges and start):
            self.answer(200, content)
        elif int(start) >= len(content):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        else:
            served = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            self.answer(206, content[int(start) :], served)

    def answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | dict(headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


def html_page(wheels: list[Wheel], prefix: str) -> bytes:
    anchors = (
        f'<a href="{html.escape(prefix + wheel.filename)}#sha256={wheel.sha256}">{wheel.filename}</a><br>'
        for wheel in wheels
    )
    return f"<!DOCTYPE html><html><body>{''.join(anchors)}</body></html>".encode()


def status(code: int, **headers: str) -> Callable[[_Handler], None]:
    """Answer with an HTTP error."""
    return lambda handler: handler.answer(code, b"", {key.replace("_", "-"): v for key, v in headers.items()})


def redirect(url: str, body_length: int = 0) -> Callable[[_Handler], None]:
    """Answer with a redirect; with a `body_length`, one whose body never comes."""

    def answer(handler: _Handler) -> None:
        handler.answer(302, b"", {"Location": url, "Content-Length": str(body_length)})
        if body_length:
            handler.server.release.wait(30)

    return answer


def cut(nbytes: int, *, hang: bool = False) -> Callable[[_Handler], None]:
    """Promise the whole file, send its first bytes, then close the connection or go silent."""

    def answer(handler: _Handler) -> None:
        content = handler.server.files[handler.path.rpartition("/")[2]]
        handler.answer(200, content[:nbytes], {"Content-Length": str(len(content))})
        handler.wfile.flush()
        if hang:
            handler.server.release.wait(30)
        handler.close_connection = True

    return answer


def body(content: bytes, **headers: str) -> Callable[[_Handler], None]:
    """Answer 200 with other content than asked for."""
    return lambda handler: handler.answer(
        200, content, {key.replace("_", "-"): v for key, v in headers.items()}
    )


@contextlib.contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        if isinstance(server, IndexServer):
            server.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


def write_static_index(folder: Path, pinned: Pinned) -> str:
    """Lay out an index in files, as static mirrors do; return its file:// address."""
    (folder / "files").mkdir(parents=True, exist_ok=True)
    for filename, content in pinned.wheels.items():
        (folder / "files" / filename).write_bytes(content)
    for wheel in pinned.alias.wheels:
        page = folder / "simple" / wheel.project / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_bytes(html_page([wheel], "../../files/"))
    return (folder / "simple").as_uri()
