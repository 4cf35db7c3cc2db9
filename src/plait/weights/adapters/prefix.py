"""Prefix tuning: every layer is given learned keys and values in front of the text.

Source: Li, Liang 2021, arXiv:2101.00190, in the form without the helper network, as files keep it.

Shapes: L virtual tokens, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from plait.weights.adapters.base import AdapterConfig, Beginning, Geometry, number, peft_settings

__all__ = ["Prefix"]


class KeysAndValues(Beginning):
    """Keys and values for each layer. Keys are used as they are, whatever the model rotates.

    Args:
        numbers: (L, layers * 2 * G * D), in each layer keys before values.
    """

    def layer(self, index: int, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (G, L, D) each."""
        shape = (len(self.numbers), geometry.layers, 2, geometry.num_kv_heads, geometry.head_dim)
        keys, values = self.numbers.view(shape)[:, index].unbind(1)
        return keys.transpose(0, 1), values.transpose(0, 1)


@dataclass(frozen=True, kw_only=True)
class Prefix(AdapterConfig, name="prefix"):
    """Learned keys and values in front of every text, as a strand that all its requests share.

    The model's products stay as they are; each token attends to a few more keys. Reaches less far than LoRA, and starts
    from random keys, so that it changes the model from the first step on.

    Args:
        tokens: L, how many keys each layer is given.
        spread: of the random numbers that training starts from.
    """

    tokens: Annotated[int, Field(ge=1, le=4096)] = 16
    spread: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    def beginning(self, geometry: Geometry, generator: torch.Generator) -> KeysAndValues:
        numbers = torch.empty(self.tokens, geometry.layers * 2 * geometry.num_kv_heads * geometry.head_dim)
        return KeysAndValues(numbers.normal_(0, self.spread, generator=generator))

    def to_peft(self) -> dict[str, Any]:
        return {
            "num_virtual_tokens": self.tokens,
            "prefix_projection": False,
            "num_transformer_submodules": 1,
        }

    def peft_geometry(self, geometry: Geometry) -> dict[str, Any]:
        return {
            "num_layers": geometry.layers,
            "num_attention_heads": geometry.num_kv_heads,
            "token_dim": geometry.num_kv_heads * geometry.head_dim,
            "encoder_hidden_size": geometry.num_kv_heads * geometry.head_dim,
        }

    def restored_beginning(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> KeysAndValues:
        wanted = (self.tokens, geometry.layers * 2 * geometry.num_kv_heads * geometry.head_dim)
        return KeysAndValues(self.checked_numbers(tensors, wanted))

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        peft_settings(config, ignored={"modules_to_save": None})
        return cls(tokens=number(config, "num_virtual_tokens", 0))
