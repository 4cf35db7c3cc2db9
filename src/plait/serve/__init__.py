"""An HTTP server: OpenAI's interface, sessions, and a page that shows what strands do. Needs the extra `serve`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from plait.errors import import_extra

if TYPE_CHECKING:
    from plait.serve.app import create_app as create_app
    from plait.serve.runner import run as run
    from plait.serve.runner import serving as serving
    from plait.serve.settings import Settings as Settings
    from plait.serve.settings import read_settings as read_settings

# Where each name lives; it is imported when it is first used, since the settings are read without the extra.
_HOMES = {
    "Settings": "plait.serve.settings",
    "create_app": "plait.serve.app",
    "read_settings": "plait.serve.settings",
    "run": "plait.serve.runner",
    "serving": "plait.serve.runner",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'plait.serve' has no attribute {name!r}")
    if not _HOMES[name].endswith("settings"):
        for module in ("fastapi", "uvicorn", "prometheus_client"):
            import_extra(module, extra="serve", purpose="plait serve")
    return getattr(importlib.import_module(_HOMES[name]), name)
