"""How parameters are stored: formats, packed matrices, and the linear layers that use them."""

from __future__ import annotations

from plait.weights.awq import AWQ
from plait.weights.bitmod import BitMoD
from plait.weights.bitstack import BitStack
from plait.weights.coded import GRIDS, Coded
from plait.weights.db_llm import DBLLM
from plait.weights.decoupleq import DecoupleQ
from plait.weights.format import (
    FORMATS,
    PACKED_KINDS,
    BlockRun,
    Dense,
    Elastic,
    Embedding,
    Linear,
    ModelRun,
    Packed,
    Stacked,
    WeightFormat,
)
from plait.weights.ggml import Blocks
from plait.weights.gptq import GPTQ
from plait.weights.hqq import HQQ
from plait.weights.loftq import LoftQ
from plait.weights.nf4 import NF4
from plait.weights.stacked_blocks import BlockStack
from plait.weights.stats import Stats
from plait.weights.tunable import Tunable, TunableCodes, tunable
from plait.weights.uniform import Uniform
from plait.weights.vq import VQ, Additive

__all__ = [
    "AWQ",
    "DBLLM",
    "FORMATS",
    "GPTQ",
    "GRIDS",
    "HQQ",
    "NF4",
    "PACKED_KINDS",
    "VQ",
    "Additive",
    "BitMoD",
    "BitStack",
    "BlockRun",
    "BlockStack",
    "Blocks",
    "Coded",
    "DecoupleQ",
    "Dense",
    "Elastic",
    "Embedding",
    "Linear",
    "LoftQ",
    "ModelRun",
    "Packed",
    "Stacked",
    "Stats",
    "Tunable",
    "TunableCodes",
    "Uniform",
    "WeightFormat",
    "tunable",
]
