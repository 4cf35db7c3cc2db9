"""Dense: keys and values as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from plait.memory.plan import Codec

__all__ = ["Dense"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Dense(Codec, name="dense"):
    """Keep keys and values as they are.

    Exact in `fp32`. `bf16` and `fp16` halve the bytes and round each number once when it is
    written; scores, sums and merges stay fp32.

    Args:
        dtype: number format of the stored keys and values.
    """

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"

    @property
    def tail_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]
