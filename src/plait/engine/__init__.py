"""Requests in, tokens out: the engine, sessions, and `load`."""

from __future__ import annotations

from plait.engine.adapters import Adapters
from plait.engine.async_engine import AsyncEngine, Stream
from plait.engine.byte_model import ByteGeneration, ByteLM, Ensemble, Fill, Settled, ensemble
from plait.engine.context_store import ContextStore
from plait.engine.contexts import APE, ContextReport, ParallelExample
from plait.engine.edits import Edit, EditReport, TokenEdit
from plait.engine.engine import Engine
from plait.engine.language_model import LanguageModel, Message
from plait.engine.loading import load, merge_adapter
from plait.engine.metrics import Metrics
from plait.engine.quantizing import quantize
from plait.engine.request import Beam, FinishReason, Generation, Piece, Request, Suggestion
from plait.engine.scoring import Score
from plait.engine.sequence import RunningSequence
from plait.engine.session import Session

__all__ = [
    "Adapters",
    "AsyncEngine",
    "APE",
    "ContextReport",
    "ContextStore",
    "Edit",
    "EditReport",
    "Beam",
    "ByteGeneration",
    "ByteLM",
    "Engine",
    "Ensemble",
    "Fill",
    "FinishReason",
    "Generation",
    "LanguageModel",
    "Message",
    "Metrics",
    "ParallelExample",
    "Piece",
    "Request",
    "RunningSequence",
    "Score",
    "Session",
    "Settled",
    "Stream",
    "TokenEdit",
    "Suggestion",
    "ensemble",
    "load",
    "merge_adapter",
    "quantize",
]
