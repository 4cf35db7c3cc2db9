"""Resolve a pinned alias in a process of its own.

`resolve_child.py PINS` resolves the alias described by the JSON file PINS once, and prints the path.
`resolve_child.py PINS MODEL` dies by SIGKILL at every system call that changes the disk, one after
another: at the first, then again from an empty cache at the second, and so on. After each it prints
one JSON line: the call, whether the model was there whole, absent or broken, and whether resolving
again without a kill gave the whole model and left nothing else.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plait.hub import ALIASES, Alias, Wheel, cache_dir, resolve
from plait.hub import files as hub_files

CALLS = ("mkdir", "open", "write", "ftruncate", "fsync", "replace", "unlink")


def register(pins: dict[str, Any]) -> str:
    alias = Alias(**pins | {"wheels": tuple(Wheel(**wheel) for wheel in pins["wheels"])})
    ALIASES[alias.name] = alias  # type: ignore[index]
    return alias.name


def die_at(moment: int, note: Path) -> None:
    """Arrange a SIGKILL at one call; half of the bytes of a `write` still reach the disk."""
    counter = itertools.count(1)

    def fatal(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(counter) == moment:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                note.write_text(name)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, fatal(name, getattr(os, name)))


def in_child(action: Callable[[], object]) -> bool:
    """Run an action in a forked process; whether it ended by itself and well."""
    child = os.fork()
    if child == 0:
        action()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def kill_everywhere(name: str, model: bytes) -> None:
    hub_files.CHUNK = 200
    note = cache_dir().with_name("note")
    final = cache_dir() / "models" / name / "pypi" / ALIASES[name].filename
    for moment in itertools.count(1):
        shutil.rmtree(cache_dir(), ignore_errors=True)

        def run(moment: int = moment) -> None:
            die_at(moment, note)
            resolve(name)

        if in_child(run):
            return
        state = "absent" if not final.exists() else "whole" if final.read_bytes() == model else "broken"
        recovered = in_child(lambda: resolve(name)) and final.read_bytes() == model
        # The wheels of a model that was already whole stay until `remove`.
        others = [path for path in cache_dir().rglob("*") if path.is_file() and path != final]
        stray = [path.name for path in others if path.suffix != ".lock" and state == "absent"]
        report = {"call": note.read_text(), "state": state, "recovered": recovered, "stray": stray}
        sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    chosen = register(json.loads(Path(sys.argv[1]).read_text()))
    if len(sys.argv) > 2:
        kill_everywhere(chosen, Path(sys.argv[2]).read_bytes())
    else:
        sys.stdout.write(f"{resolve(chosen)}\n")
