"""Plait: efficient sequence models built on one memory of strands.

Example:
    >>> import plait
    >>> lm = plait.load("smollm2")  # doctest: +SKIP
    >>> lm.generate("The history of computing", max_new_tokens=64).text  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plait.decode import Sampling as Sampling
    from plait.engine import APE as APE
    from plait.engine import AsyncEngine as AsyncEngine
    from plait.engine import Beam as Beam
    from plait.engine import ByteLM as ByteLM
    from plait.engine import ContextStore as ContextStore
    from plait.engine import Edit as Edit
    from plait.engine import EditReport as EditReport
    from plait.engine import Engine as Engine
    from plait.engine import Generation as Generation
    from plait.engine import LanguageModel as LanguageModel
    from plait.engine import ParallelExample as ParallelExample
    from plait.engine import Piece as Piece
    from plait.engine import Request as Request
    from plait.engine import Score as Score
    from plait.engine import Session as Session
    from plait.engine import Suggestion as Suggestion
    from plait.engine import ensemble as ensemble
    from plait.engine import load as load
    from plait.engine import quantize as quantize
    from plait.errors import CancelledError as CancelledError
    from plait.errors import CapacityError as CapacityError
    from plait.errors import ConfigError as ConfigError
    from plait.errors import DownloadError as DownloadError
    from plait.errors import IncompatibleError as IncompatibleError
    from plait.errors import MissingExtraError as MissingExtraError
    from plait.errors import ModelFileError as ModelFileError
    from plait.errors import PlaitError as PlaitError
    from plait.errors import TemplateError as TemplateError
    from plait.errors import UnknownNameError as UnknownNameError
    from plait.hub import pull as pull
    from plait.memory import MemoryPlan as MemoryPlan

__version__ = "0.1.0"

# Where each public name lives; it is imported when it is first used, so that `import plait` is quick.
_HOMES = {
    "AsyncEngine": "plait.engine",
    "APE": "plait.engine",
    "Beam": "plait.engine",
    "ByteLM": "plait.engine",
    "CancelledError": "plait.errors",
    "CapacityError": "plait.errors",
    "ConfigError": "plait.errors",
    "ContextStore": "plait.engine",
    "DownloadError": "plait.errors",
    "Edit": "plait.engine",
    "EditReport": "plait.engine",
    "Engine": "plait.engine",
    "Generation": "plait.engine",
    "IncompatibleError": "plait.errors",
    "LanguageModel": "plait.engine",
    "MemoryPlan": "plait.memory",
    "MissingExtraError": "plait.errors",
    "ModelFileError": "plait.errors",
    "ParallelExample": "plait.engine",
    "Piece": "plait.engine",
    "PlaitError": "plait.errors",
    "Request": "plait.engine",
    "Sampling": "plait.decode",
    "Score": "plait.engine",
    "Session": "plait.engine",
    "Suggestion": "plait.engine",
    "TemplateError": "plait.errors",
    "UnknownNameError": "plait.errors",
    "ensemble": "plait.engine",
    "load": "plait.engine",
    "quantize": "plait.engine",
    "pull": "plait.hub",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'plait' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
