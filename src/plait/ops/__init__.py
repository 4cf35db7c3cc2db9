"""Numerical primitives, each with one torch reference and, where built, one native form.

With `PLAIT_NATIVE=1` the form is chosen at each call: native for floats on the CPU when no gradient is asked
for, else the reference. Without it, only packed matrices are native.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from plait.ops import attention, native, partial, reference, rope
from plait.ops.additive import AdditiveMatrix
from plait.ops.attention import Scoring
from plait.ops.bits import (
    WORD,
    WORD_TILE,
    BitMatrix,
    bits_of_words,
    sign_words,
    words_of_bits,
)
from plait.ops.distance_bias import DistanceBias
from plait.ops.grid import GridMatrix
from plait.ops.masks import Causal, Everything, Far, Mask, Placed, SomeQueries, Tree, View
from plait.ops.native import PackedMatrix, has_native_matrices, has_packed_form
from plait.ops.padded import padded, padded_attention
from plait.ops.partial import Partial, empty_partial, merge_all
from plait.ops.reference import activate, capped, layer_norm
from plait.ops.rope import Angles, Rope
from plait.ops.stack import StackMatrix

__all__ = [
    "WORD",
    "WORD_TILE",
    "AdditiveMatrix",
    "Angles",
    "Causal",
    "DistanceBias",
    "Everything",
    "Far",
    "BitMatrix",
    "GridMatrix",
    "Mask",
    "PackedMatrix",
    "Partial",
    "Placed",
    "Rope",
    "Scoring",
    "SomeQueries",
    "StackMatrix",
    "Tree",
    "View",
    "activate",
    "bits_of_words",
    "capped",
    "empty_partial",
    "has_native_matrices",
    "has_packed_form",
    "layer_norm",
    "linear",
    "merge",
    "merge_all",
    "padded",
    "padded_attention",
    "partial_attention",
    "rms_norm",
    "rotate",
    "sign_words",
    "words_of_bits",
]

P = ParamSpec("P")
R = TypeVar("R")


def _either(plain: Callable[P, R], fast: Callable[..., R]) -> Callable[P, R]:
    # The native form need not know every argument of the reference: `native.takes` refuses the others.
    @wraps(plain)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        if native.is_everywhere() and native.takes((*args, *kwargs.values())):
            return fast(*args, **kwargs)
        return plain(*args, **kwargs)

    return chosen


linear = _either(reference.linear, native.linear)
rms_norm = _either(reference.rms_norm, native.rms_norm)
partial_attention = _either(attention.partial_attention, native.partial_attention)
rotate = _either(rope.rotate, native.rotate)
merge = _either(partial.merge, native.merge)
