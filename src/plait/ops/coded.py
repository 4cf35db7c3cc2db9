"""Native attention over keys and values that are stored in few bits, as they are stored.

A number is one fused multiply-add of its code, where the torch form multiplies and adds; sums run in chunks of
256 tokens counted from the first one stored. Out and lse agree with attention over the decoded numbers to fp32
rounding. As everywhere, a row's bits do not depend on the rows beside it.

Shapes: Q queries, T tokens, H query heads, G key/value heads, D channels of a head, K of them stored, r rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from plait.ops import native
from plait.ops.masks import Everything, Mask, Tree
from plait.ops.partial import Partial

__all__ = ["CODED", "CodedForm", "CodedNumbers", "StoredNumbers", "can_be_read", "coded_attention"]

# Stands for a number format in the program's table of visits.
CODED = 3

# Channels of a head, and rank, that the kernels have room for.
_MOST_WIDTH = 1024


def can_be_read(*widths: int, like: Tensor) -> bool:
    """Whether heads of these many channels, in tensors on the device of one, have a native form."""
    return native.module() is not None and like.is_cpu and all(0 < width <= _MOST_WIDTH for width in widths)


class StoredNumbers:
    """Numbers (T, G, K) as a kernel reads them; made by `of_codes` or `of_numbers`, without a copy."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    @classmethod
    def of_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        minimum: Tensor,
        *,
        bits: int,
        along_tokens: bool,
        group: int,
        skipped: int,
        num_heads: int,
        width: int,
    ) -> Self:
        """Codes (T, bytes of a row), with scales and minima in fp16; see `plait.memory.codes.AffineCodes`."""
        made = native.extension().StoredNumbers.affine(
            codes.contiguous(), scale.contiguous(), minimum.contiguous(), bits, along_tokens, group, skipped,
            num_heads, width,
        )  # fmt: skip
        return cls(made)

    @classmethod
    def of_numbers(cls, numbers: Tensor) -> Self:
        """Plain numbers (G, T, K) in fp32, bf16 or fp16."""
        numbers = numbers.detach()
        return cls(
            native.extension().StoredNumbers.plain(
                numbers if numbers.stride(-1) == 1 else numbers.contiguous()
            )
        )


class CodedNumbers:
    """Keys or values of one strand: stored numbers, and what repairs them."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    @classmethod
    def of(
        cls,
        stored: StoredNumbers,
        *,
        factor: tuple[StoredNumbers, Tensor] | None = None,
        outliers: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    ) -> Self:
        """Put the parts together.

        Args:
            factor: the low-rank part, tokens (T, G, r) and channels (G, K, r) fp16.
            outliers: of single places, sorted by block of 256 tokens, head and token: where each block and head
                starts (blocks * G + 1) int32, token in the block uint8, channel of the head int16, and what is
                added fp16.
        """
        handle = native.extension().CodedNumbers(stored.handle)
        if factor is not None:
            handle.set_factor(factor[0].handle, factor[1].contiguous())
        if outliers is not None:
            handle.set_outliers(*outliers)
        return cls(handle)

    def thinned(self, kept: Tensor, dim: int, means: Tensor | None = None) -> CodedNumbers:
        """The same numbers as channels `kept` (G, K) int16 of D; the others are 0, or their means (G, D) fp32."""
        return CodedNumbers(self.handle.thinned(kept.contiguous(), dim, means))

    def description_at(self, numbers: Tensor, to: int) -> bytes | None:
        """What would describe them if the bytes (n,) in which all of them lie stood at another address.

        None where some lie elsewhere.
        """
        found: bytes | None = self.handle.description_at(numbers.data_ptr(), numbers.nbytes, to)
        return found

    def address(self) -> int:
        """Where the description lies, for a program; valid while this object lives."""
        return int(self.handle.address())


class CodedForm(NamedTuple):
    """A strand as the kernels read it.

    Attributes:
        keys, values: of the whole storage.
        first: the strand's first token within it.
    """

    keys: CodedNumbers
    values: CodedNumbers
    first: int


def coded_attention(
    q: Tensor,
    form: CodedForm,
    length: int,
    *,
    scale: float,
    value_dim: int,
    mask: Mask | None = None,
    first_query: int = 0,
    first_key: int = 0,
    window: int | None = None,
    softcap: float | None = None,
) -> Partial:
    """Attention of every query (Q, H, D) over `length` tokens; see `plait.ops.partial_attention`."""
    num_queries, num_heads, head_dim = q.shape
    mask = mask or Everything()
    depths = ancestors = None
    if isinstance(mask, Tree):
        depths, ancestors = mask.depths(num_queries).contiguous(), native.tree_bits(mask)
    q = q.detach().float()
    if q.stride(2) != 1 or (num_heads > 1 and q.stride(1) != head_dim):
        q = q.contiguous()
    out = torch.empty(num_queries, num_heads, value_dim)
    lse = torch.empty(num_queries, num_heads)
    native.extension().coded_attention(
        q, form.keys.handle, form.values.handle, form.first, length, scale, native.mask_kind(mask), first_query,
        first_key, window or 0, softcap or 0.0, depths, ancestors, out, lse,
    )  # fmt: skip
    return Partial(out, lse)
