"""A stand-in for the Hugging Face hub on loopback: one repository, the two calls that are used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves `repo` with `files`; names in `large` have a known SHA-256, as large files do.

    `error` is the code with which everything is refused; `damaged` names files sent with other bytes.
    """

    daemon_threads = True

    def __init__(self, repo: str, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo = repo
        self.files = dict(files)
        self.large = {name for name in files if name.endswith((".safetensors", ".gguf", ".bin"))}
        self.damaged: set[str] = set()
        self.error: tuple[int, str] | None = None
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def sent(self) -> set[str]:
        """The files of which the content was asked for."""
        prefix = f"GET /{self.repo}/resolve/{COMMIT}/"
        return {request.removeprefix(prefix) for request in self.requests if request.startswith(prefix)}

    def listing(self) -> dict[str, object]:
        siblings = []
        for name, content in self.files.items():
            sibling: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
            if name in self.large:
                digest = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            siblings.append(sibling)
        return {"id": self.repo, "sha": COMMIT, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def respond(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        file = path.removeprefix(f"/{hub.repo}/resolve/{COMMIT}/")
        if hub.error:
            self.answer(hub.error[0], b"", {"X-Error-Code": hub.error[1]})
        elif path.startswith("/api/models/") and not path.startswith(f"/api/models/{hub.repo}/"):
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif path in (f"/api/models/{hub.repo}/revision/{name}" for name in ("main", "v1", COMMIT)):
            self.answer(200, json.dumps(hub.listing()).encode(), {"Content-Type": "application/json"})
        elif path.startswith("/api/"):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif file in hub.files:
            content = hub.files[file]
            etag = hashlib.sha256(content).hexdigest()
            if file in hub.damaged:
                content = content[::-1]
            self.answer(
                200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            )
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
