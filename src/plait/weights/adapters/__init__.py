"""Adapters: methods that change a frozen model by few numbers, one file each."""

from __future__ import annotations

from plait.weights.adapters.adalora import AdaLoRA
from plait.weights.adapters.base import (
    ADAPTERS,
    PLACES,
    AdapterConfig,
    Beginning,
    Bottleneck,
    Change,
    Delta,
    Geometry,
    Matrix,
)
from plait.weights.adapters.bitfit import BitFit
from plait.weights.adapters.dora import DoRA
from plait.weights.adapters.ia3 import IA3
from plait.weights.adapters.lora import LoRA
from plait.weights.adapters.parallel import Parallel
from plait.weights.adapters.prefix import KeysAndValues, Prefix
from plait.weights.adapters.prompt import Embeddings, Prompt
from plait.weights.adapters.serial import Serial
from plait.weights.adapters.vera import VeRA

__all__ = [
    "ADAPTERS",
    "IA3",
    "PLACES",
    "AdaLoRA",
    "AdapterConfig",
    "Beginning",
    "Bottleneck",
    "BitFit",
    "Change",
    "Delta",
    "DoRA",
    "Embeddings",
    "Geometry",
    "KeysAndValues",
    "LoRA",
    "Matrix",
    "Parallel",
    "Prefix",
    "Prompt",
    "Serial",
    "VeRA",
]
