"""Renders templates from model files in a process of their own, within limits.

A template is a program that came with a model. minijinja bounds its steps, but neither its memory
(`{% set s = s ~ s %}` doubles a string in one step) nor its stack, and running out of either ends the
whole process. So that process is a child with nothing to lose.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.errors import ConfigError, TemplateError

__all__ = ["SANDBOX", "Limits", "Sandbox"]

_WORKER = Path(__file__).with_name("_template_worker.py")
_SECONDS_TO_START = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one rendering may take.

    Args:
        fuel: minijinja's instructions.
        memory: bytes, beyond those of the idle process (Linux only).
        cpu_seconds: seconds of CPU time (POSIX only).
        seconds: seconds on the clock.
        output: characters of the result.
    """

    fuel: int = 5_000_000
    memory: int = 256 << 20
    cpu_seconds: float = 0.5
    seconds: float = 10.0
    output: int = 4 << 20


class Sandbox:
    """One child process that renders templates: started when needed, and anew after it has died.

    May be used from many threads; renderings wait for each other.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, source: str, context: Mapping[str, Any]) -> str:
        """Render a template.

        Args:
            source: Jinja source.
            context: the variables, of JSON's types.

        Raises:
            ConfigError: a variable is not of JSON's types.
            TemplateError: the template is wrong, refuses its input or goes over a limit; or the child
                process does not start.
        """
        try:
            request = json.dumps({"source": source, "context": context}, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"A chat template takes what JSON can hold, and not this: {error}.") from error
        with self._lock:
            reply = self._ask(self._running(), request, self.limits.seconds)
            if reply is None:
                raise TemplateError(f"The chat template {self._bury()}. Give another template.")
        if "error" in reply:
            raise TemplateError(f"The chat template failed: {reply['error']}")
        return str(reply["text"])

    def close(self) -> None:
        """End the child process; the next rendering starts another."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._bury()

    def forget(self) -> None:
        """After a fork: leave the child process to the parent."""
        self._lock = threading.Lock()
        if self._process is not None:
            # It is not this process's child, so nothing must wait for it.
            self._process.returncode = 0
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._bury()
        return self._process or self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # Isolated and without `site`: only `path` says where modules come from, and it starts faster.
        command = [sys.executable, "-I", "-S", str(_WORKER)]
        try:
            self._process = process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Ctrl-C at the terminal is for the parent alone.
                start_new_session=True,
            )
        except OSError as error:
            raise TemplateError(
                f"Chat templates run in a Python process of their own, which does not start: {error}."
            ) from error
        limits = self.limits
        settings = {
            "path": [entry for entry in sys.path if isinstance(entry, str)],
            "fuel": limits.fuel,
            "memory": limits.memory,
            "cpu_seconds": limits.cpu_seconds,
            "output": limits.output,
        }
        if self._ask(process, json.dumps(settings).encode(), _SECONDS_TO_START) is None:
            self._bury()
            raise TemplateError(
                f"Chat templates run in a Python process of their own, and {sys.executable} did not start"
                " one. Install minijinja for it."
            )
        return process

    def _ask(self, process: subprocess.Popen[bytes], request: bytes, seconds: float) -> dict[str, Any] | None:
        """Send one line and read one; None if the process ends instead or takes longer."""
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(request + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            return None
        finally:
            timer.cancel()
        return json.loads(line) if line.endswith(b"\n") else None

    def _bury(self) -> str:
        """Release what is left of a dying process; returns what it died of."""
        process, self._process = self._process, None
        assert process is not None
        status = process.wait()
        for pipe in (process.stdin, process.stdout):
            # What is left in the pipe has nowhere to go.
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()
        killers = [getattr(signal, name, None) for name in ("SIGPROF", "SIGKILL")]
        if -status in killers:
            return "took too much time"
        return "took too much memory or nested too deeply"


SANDBOX = Sandbox()
atexit.register(SANDBOX.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=SANDBOX.forget)
