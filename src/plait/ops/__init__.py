"""Numerical primitives, each with one torch reference and, where built, one native form."""

from __future__ import annotations

from plait.ops.attention import partial_attention
from plait.ops.masks import Causal, Everything, Mask, Tree, View
from plait.ops.partial import Partial, empty_partial, merge, merge_all
from plait.ops.reference import layer_norm, linear, rms_norm
from plait.ops.rope import Angles, Rope, rotate

__all__ = [
    "Angles",
    "Causal",
    "Everything",
    "Mask",
    "Partial",
    "Rope",
    "Tree",
    "View",
    "empty_partial",
    "layer_norm",
    "linear",
    "merge",
    "merge_all",
    "partial_attention",
    "rms_norm",
    "rotate",
]
