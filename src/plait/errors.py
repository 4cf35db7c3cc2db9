"""Every error Plait raises on purpose.

PlaitError
├── ConfigError (also ValueError)      a setting, argument or spec string is not allowed
│   ├── UnknownNameError               no method, model or family has that name
│   └── IncompatibleError              two choices that cannot work together
├── ModelFileError                     a model file is missing, damaged, hostile or of an unknown kind
├── DownloadError                      a model could not be brought to this machine
├── TemplateError                      a chat template failed or went over its limits
├── CapacityError                      a request needs more context or memory than there is
├── CancelledError                     the request was cancelled before it finished
└── MissingExtraError (also ImportError)   an optional dependency is not installed

Each message says what was given, what is allowed and what to do next. The same sentence reaches
a Python caller, the command line and HTTP.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

__all__ = [
    "CancelledError",
    "CapacityError",
    "ConfigError",
    "DownloadError",
    "IncompatibleError",
    "MissingExtraError",
    "ModelFileError",
    "PlaitError",
    "TemplateError",
    "UnknownNameError",
    "import_extra",
    "suggestion",
]


class PlaitError(Exception):
    """Base of every error raised on purpose by Plait."""


class ConfigError(PlaitError, ValueError):
    """A setting, argument or spec string is outside what is allowed."""


class UnknownNameError(ConfigError):
    """No method, model or family is registered under the given name."""


class IncompatibleError(ConfigError):
    """Two choices that cannot work together; the message names both."""


class ModelFileError(PlaitError):
    """A model file is missing, truncated, inconsistent, or of a kind that is not loaded."""


class DownloadError(PlaitError):
    """A model could not be downloaded; running the same command again resumes."""


class TemplateError(PlaitError):
    """A chat template failed to compile or render, or used more work than it is allowed."""


class CapacityError(PlaitError):
    """A request needs more context, memory or disk than is available."""


class CancelledError(PlaitError):
    """The request was cancelled before it finished."""


class MissingExtraError(PlaitError, ImportError):
    """An optional dependency is needed; the message holds the pip command."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` when a known name is close to `name`, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def import_extra(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Args:
        module: dotted module name, such as `"huggingface_hub"`.
        extra: the extra in `pip install 'plait[extra]'`.
        purpose: subject of the sentence, such as `"plait serve"`.

    Raises:
        MissingExtraError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs {module.split('.')[0]}. Install it with: pip install 'plait[{extra}]'"
        ) from error
