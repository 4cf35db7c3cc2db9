"""How parameters are stored: formats, packed matrices, and the linear layers that use them."""

from __future__ import annotations

from plait.weights.format import FORMATS, Dense, Embedding, Linear, Packed, Stacked, WeightFormat
from plait.weights.ggml import Blocks

__all__ = ["FORMATS", "Blocks", "Dense", "Embedding", "Linear", "Packed", "Stacked", "WeightFormat"]
