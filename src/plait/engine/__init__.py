"""Requests in, tokens out: the engine, sessions, and `load`."""

from __future__ import annotations

from plait.engine.edits import Edit, EditReport, TokenEdit
from plait.engine.engine import Engine
from plait.engine.language_model import LanguageModel, Message, Score
from plait.engine.loading import load
from plait.engine.request import FinishReason, Generation, Piece, Request
from plait.engine.sequence import RunningSequence
from plait.engine.session import Session

__all__ = [
    "Edit",
    "EditReport",
    "Engine",
    "FinishReason",
    "Generation",
    "LanguageModel",
    "Message",
    "Piece",
    "Request",
    "RunningSequence",
    "Score",
    "Session",
    "TokenEdit",
    "load",
]
