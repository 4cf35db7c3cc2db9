"""The process that renders chat templates: reads requests from stdin, writes replies to stdout.

`plait.text.sandbox` runs it as a script, and it imports nothing of Plait. Requests and replies are
lines of JSON. The first request is `{"path", "fuel", "memory", "cpu_seconds", "output"}`; the others
are `{"source", "context"}`, answered by `{"text"}` or `{"error"}`.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import sys
from collections.abc import Callable
from typing import Any

# Hugging Face's marks around the assistant's text, which print nothing.
_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


class RefusalError(Exception):
    """What a template says with `raise_exception`."""


def main() -> None:
    """Answer requests until stdin ends."""
    with open(sys.stdin.fileno(), encoding="utf-8", closefd=False) as requests:
        settings = json.loads(requests.readline())
        sys.path = settings["path"]
        import minijinja

        limit_cpu_time = _limit_resources(settings["memory"])
        _reply({"ready": True})
        for line in requests:
            limit_cpu_time(settings["cpu_seconds"])
            reply = _rendered(minijinja, settings, json.loads(line))
            limit_cpu_time(0)
            _reply(reply)


def _rendered(minijinja: Any, settings: dict[str, Any], request: dict[str, Any]) -> dict[str, str]:
    try:
        environment = _environment(minijinja, settings["fuel"])
        source = _GENERATION.sub(_as_condition, request["source"])
        text = environment.render_str(source, "chat template", **request["context"])
    except minijinja.TemplateError as error:
        return {"error": error.message}
    # Filters and functions raise whatever Python raises for a wrong argument.
    except Exception as error:  # noqa: BLE001
        return {"error": str(error) or type(error).__name__}
    if len(text) > settings["output"]:
        return {"error": f"it wrote {len(text)} characters, above the limit of {settings['output']}"}
    return {"text": text}


def _environment(minijinja: Any, fuel: int) -> Any:
    """The functions, filters and settings that Hugging Face gives to templates, in minijinja."""
    return minijinja.Environment(
        filters={"tojson": _tojson},
        tests={"sequence": lambda value: isinstance(value, (str, list, tuple, dict))},
        globals={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
        auto_escape_callback=lambda name: False,
        fuel=fuel,
        # Messages then name what is undefined.
        debug=True,
        trim_blocks=True,
        lstrip_blocks=True,
        pycompat=True,
    )


def _as_condition(mark: re.Match[str]) -> str:
    start, end, close = mark.groups()
    return f"{start}endif{close}" if end else f"{start}if true{close}"


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> None:
    raise RefusalError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _limit_resources(memory: int) -> Callable[[float], None]:
    """Allow `memory` more bytes from here on; returns what sets a limit on CPU seconds (0: none).

    Where the system knows no such limits, only the time that the parent waits is bounded.
    """
    try:
        import resource
        import signal
    except ImportError:
        return lambda seconds: None

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as sizes:
        allowed = int(sizes.read().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))

    def limit_cpu_time(seconds: float) -> None:
        # The signal's default action ends the process, whatever it is doing.
        signal.setitimer(signal.ITIMER_PROF, seconds)

    return limit_cpu_time


def _reply(reply: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
