"""Softmax attention over strands, with grouped key/value heads.

Shapes: N packed rows, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from plait import ops
from plait.errors import ConfigError
from plait.memory import Heads, Memory, MemoryPlan, Rows, State, attend
from plait.nn.config import Count, MixerConfig, NormConfig
from plait.nn.distance_bias import BIASES, DistanceBiasConfig, bias_of
from plait.nn.layers import Norm
from plait.nn.mixers.base import Mixer
from plait.nn.parameters import Parameters
from plait.nn.rotary import RopeConfig, rope_of
from plait.nn.routing import prefix_of

__all__ = ["Attention", "AttentionConfig"]


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig, name="attention"):
    """Softmax attention.

    Args:
        num_heads: query heads H.
        num_kv_heads: key/value heads G; divides H.
        head_dim: size D of a head.
        scale: factor on the scores; `head_dim ** -0.5` when None.
        softcap: c in `c * tanh(score / c)`, or None.
        rope: rotary positions, or None.
        window: visible positions, the query's own included; None for no limit.
        qkv_bias, output_bias: whether the projections have biases.
        qk_norm: whether queries and keys are normalised over `head_dim` before they are rotated.
        distance_bias: what is taken off scores, capped ones too, by distance; with rotary positions or without.
    """

    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    scale: float | None = None
    softcap: Annotated[float, Field(gt=0)] | None = None
    rope: RopeConfig | None = None
    window: Annotated[int, Field(ge=1)] | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    distance_bias: DistanceBiasConfig | None = None

    def check(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"AttentionConfig.num_kv_heads must divide num_heads {self.num_heads}. Got {self.num_kv_heads}."
            )
        if self.rope is not None and self.rope.dim > self.head_dim:
            raise ConfigError(
                f"AttentionConfig.rope rotates {self.rope.dim} channels of heads of {self.head_dim}. "
                "It must not rotate more than there are."
            )
        if self.distance_bias is not None and not hasattr(self.distance_bias, "name"):
            raise ConfigError(
                f"AttentionConfig.distance_bias must be one of {', '.join(BIASES.names())}. Got {self.distance_bias!r}."
            )

    def build(self, width: int, norm: NormConfig, parameters: Parameters) -> Attention:
        return Attention(self, width, norm, parameters)


class Attention(Mixer):
    """Softmax attention whose past is a `Memory` of strands."""

    def __init__(self, config: AttentionConfig, width: int, norm: NormConfig, parameters: Parameters) -> None:
        super().__init__()
        self.config = config
        # Which layer of its model this is, where adapters put keys and values before the text.
        self.layer: int | None = None
        h, g, d = config.num_heads, config.num_kv_heads, config.head_dim
        # First, because it finds a head size that does not fit the file before speeds are made for it.
        self.qkv = parameters.linear(["query", "key", "value"], width, [h * d, g * d, g * d], config.qkv_bias)
        scale, bias = d**-0.5 if config.scale is None else config.scale, config.distance_bias
        self.heads = Heads(
            num_heads=h,
            num_kv_heads=g,
            head_dim=d,
            scale=scale if bias is None else scale * bias.product,
            softcap=config.softcap,
            rope=None if config.rope is None else rope_of(config.rope),
            bias=None if bias is None else bias_of(bias, h),
        )
        self.output = parameters.linear(["output"], h * d, [width], config.output_bias)
        self.query_norm = Norm(norm, d, parameters.under("query_norm")) if config.qk_norm else None
        self.key_norm = Norm(norm, d, parameters.under("key_norm")) if config.qk_norm else None

    def forward(self, x: Tensor, rows: Rows, past: Sequence[Memory | State] | None = None) -> Tensor:
        h, g, d = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        q, k, v = self.qkv(x).view(-1, h + 2 * g, d).split([h, g, g], dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if past is None:
            mixed = self._within_segments(q, k, v, rows)
        else:
            memories = [memory for memory in past if isinstance(memory, Memory)]
            mixed = attend(memories, q, k, v, rows)
        return self.output(mixed.reshape(-1, h * d), entry=x)

    def new_memory(self, plan: MemoryPlan) -> Memory:
        return Memory(self.heads, plan, self.config.window)

    def _within_segments(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """The parallel form: every segment sees its own rows, and what an adapter puts before them; differentiable."""
        prefix = prefix_of(self.layer)
        plain = q
        if self.heads.rope is not None:
            angles = rows.angles(self.heads.rope, [0] * len(rows.segments))
            q, k = ops.rotate(q, angles), ops.rotate(k, angles)
        parts = [
            ops.partial_attention(
                q[segment.rows],
                k[segment.rows].transpose(0, 1),
                v[segment.rows].transpose(0, 1),
                **self.heads.scoring,
                mask=segment.mask,
                first_query=segment.position,
                first_key=segment.position,
                window=self.config.window,
            )
            for segment in rows.segments
        ]
        if prefix is not None:
            length = prefix[0].shape[1]
            if self.heads.rope is not None:
                plain = ops.rotate(plain, rows.angles(self.heads.rope, [-length] * len(rows.segments)))
            before = [
                ops.partial_attention(
                    plain[segment.rows],
                    *prefix,
                    **self.heads.scoring,
                    mask=segment.mask,
                    first_query=segment.position,
                    first_key=-length,
                    window=self.config.window,
                )
                for segment in rows.segments
            ]
            parts = [ops.merge(first, second) for first, second in zip(before, parts, strict=True)]
        return torch.cat([part.out for part in parts]) if parts else q
