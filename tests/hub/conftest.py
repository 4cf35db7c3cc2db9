"""An empty cache for each test, and a package index on loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from index_server import IndexServer, Pinned, Publish, running

from plait.hub import ALIASES, transport

VARIABLES = ("PLAIT_INDEX_URL", "PIP_INDEX_URL", "PLAIT_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache, with an index that is nowhere and no waits between attempts."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PLAIT_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setattr(transport, "FIRST_WAIT", 0.0)
    return tmp_path / "cache"


@pytest.fixture
def index(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[IndexServer]:
    """A running package index that is the one in use."""
    server = IndexServer()
    monkeypatch.setenv("PLAIT_INDEX_URL", f"{server.url}/simple")
    with running(server):
        yield server


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[Pinned], None]:
    """Make an alias known for the length of a test."""

    def add(pinned: Pinned) -> None:
        monkeypatch.setitem(ALIASES, pinned.alias.name, pinned.alias)  # type: ignore[arg-type]

    return add


@pytest.fixture
def publish(index: IndexServer, register: Callable[[Pinned], None]) -> Publish:
    """Make an alias known and its wheels available on the index."""

    def add(pinned: Pinned) -> Pinned:
        register(pinned)
        index.serve(pinned)
        return pinned

    return add
