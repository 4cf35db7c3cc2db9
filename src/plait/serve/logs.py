"""Log lines, one for each request: what was asked for and how it went, without prompts or answers."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

__all__ = ["log_event", "set_up_logging"]

logger = logging.getLogger("plait.serve")


def log_event(event: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Write one line: the event and its fields."""
    logger.log(level, event, extra={"fields": fields})


class _Lines(logging.Formatter):
    """Log records as one line each, of text or JSON."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        if self.as_json:
            line = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage(), **fields}
            return json.dumps(line, default=str)
        # Values are quoted, so that what a client sends cannot write a line of its own.
        told = "".join(f" {name}={json.dumps(value, default=str)}" for name, value in fields.items())
        return f"{moment} {record.levelname.lower()} {record.getMessage()}{told}"


def set_up_logging(format: str) -> None:
    """Write the server's log to standard error; uvicorn's own warnings too."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines(format == "json"))
    for name in ("plait.serve", "uvicorn"):
        of_name = logging.getLogger(name)
        of_name.handlers[:] = [handler]
        of_name.setLevel(logging.INFO if name == "plait.serve" else logging.WARNING)
        of_name.propagate = False
