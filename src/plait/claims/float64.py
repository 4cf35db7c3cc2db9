"""A Llama forward pass in float64, written plainly: the truth that fp32 logits are compared with.

Shares no code with either side of the comparison. Source: Touvron et al. 2023, arXiv:2302.13971.
Shapes: T tokens, W width, H query heads, G key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["hidden_rows"]


def hidden_rows(state: Mapping[str, Tensor], config: Any, tokens: Sequence[int]) -> Tensor:
    """The rows that the output head reads, (T, W) float64.

    Args:
        state: parameters under the names of a Hugging Face Llama.
        config: its configuration; only plain rotary positions are computed.
        tokens: T ids.
    """
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    theta, epsilon = float(config.rope_parameters["rope_theta"]), config.rms_norm_eps
    head_dim = config.hidden_size // num_heads

    def weight(name: str) -> Tensor:
        return state[f"model.{name}.weight"].double()

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + epsilon) * weight(name)

    def heads(x: Tensor, count: int) -> Tensor:
        return x.view(len(tokens), count, head_dim).transpose(0, 1)

    # Turning speeds are fp32 constants of the model; the angles made from them are exact here.
    speeds = (1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)).double()
    angles = torch.arange(len(tokens)).double()[:, None] * speeds
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    x = weight("embed_tokens")[torch.tensor(tokens)]
    for i in range(config.num_hidden_layers):
        block = f"layers.{i}"
        y = norm(x, f"{block}.input_layernorm")
        q = rotated(heads(y @ weight(f"{block}.self_attn.q_proj").T, num_heads))
        k = rotated(heads(y @ weight(f"{block}.self_attn.k_proj").T, num_kv_heads))
        v = heads(y @ weight(f"{block}.self_attn.v_proj").T, num_kv_heads)
        k, v = (z.repeat_interleave(num_heads // num_kv_heads, dim=0) for z in (k, v))
        scores = q @ k.transpose(1, 2) * head_dim**-0.5
        hidden = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
        out = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1) @ v
        x = x + out.transpose(0, 1).reshape(len(tokens), -1) @ weight(f"{block}.self_attn.o_proj").T
        y = norm(x, f"{block}.post_attention_layernorm")
        gate = F.silu(y @ weight(f"{block}.mlp.gate_proj").T)
        x = x + (gate * (y @ weight(f"{block}.mlp.up_proj").T)) @ weight(f"{block}.mlp.down_proj").T
    return norm(x, "norm")
