"""Dense: keys and values as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from plait.memory.plan import Codec, Notes
from plait.memory.strand import FrozenStrand

if TYPE_CHECKING:
    from plait.memory.memory import Memory

__all__ = ["DTYPES", "Dense"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Dense(Codec, name="dense"):
    """Keep keys and values as they are.

    Exact in `fp32`. `bf16` and `fp16` halve the bytes and round each number once when it is
    written, by at most u = 2^-8 or 2^-11 of its size; scores, sums and merges stay fp32. An output then
    moves by at most (exp(2 u scale |q| |k|) - 1 + u) max |v|, with the longest query and key and the
    largest value in sight. `fp16` holds numbers up to 65,504.

    Args:
        dtype: number format of the stored keys and values.
    """

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"

    @property
    def tail_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def is_shareable(self) -> bool:
        return True

    @property
    def seals_nothing(self) -> bool:
        return True

    def seal(self, memory: Memory, *, is_prompt: bool = False) -> None:
        """Tokens stay where they are: the tail holds them in this form already."""

    def encode(self, strand: FrozenStrand, notes: Notes | None) -> FrozenStrand:
        keys, values = (numbers.to(self.tail_dtype, copy=True) for numbers in (strand.keys, strand.values))
        return FrozenStrand(strand.heads, keys, values, offset=strand.offset, start=strand.start)
