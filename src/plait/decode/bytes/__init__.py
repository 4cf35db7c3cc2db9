"""The next byte of a text, exactly, from a model of tokens."""

from __future__ import annotations

from plait.decode.bytes.cover import END, ByteState, ByteTokens, Marginal
from plait.decode.bytes.healing import heal
from plait.decode.bytes.mixture import MixtureState, NextByte
from plait.decode.bytes.reader import TokenReader

__all__ = ["END", "ByteState", "ByteTokens", "Marginal", "MixtureState", "NextByte", "TokenReader", "heal"]
