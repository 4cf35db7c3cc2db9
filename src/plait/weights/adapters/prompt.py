"""Prompt tuning: learned rows are read before the text, in place of the embeddings of tokens.

Source: Lester, Al-Rfou, Constant 2021, arXiv:2104.08691.

Shapes: L virtual tokens, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from plait.weights.adapters.base import AdapterConfig, Beginning, Geometry, number, peft_settings

__all__ = ["Prompt"]


class Embeddings(Beginning):
    """Rows that the model reads first, (L, W)."""


@dataclass(frozen=True, kw_only=True)
class Prompt(AdapterConfig, name="prompt"):
    """A prompt that no words spell: a few learned rows, read once and shared by all requests.

    The fewest numbers of all kinds, and the least that can be learned; small models gain little from it.

    Args:
        tokens: L, how many rows.
        spread: of the random numbers that training starts from; about that of the model's own embeddings.
    """

    tokens: Annotated[int, Field(ge=1, le=4096)] = 16
    spread: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1

    peft_type: ClassVar[str] = "PROMPT_TUNING"

    def beginning(self, geometry: Geometry, generator: torch.Generator) -> Embeddings:
        numbers = torch.empty(self.tokens, geometry.width)
        return Embeddings(numbers.normal_(0, self.spread, generator=generator))

    def restored_beginning(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> Embeddings:
        return Embeddings(self.checked_numbers(tensors, (self.tokens, geometry.width)))

    def to_peft(self) -> dict[str, Any]:
        return {
            "num_virtual_tokens": self.tokens,
            "prompt_tuning_init": "RANDOM",
            "num_transformer_submodules": 1,
        }

    def peft_geometry(self, geometry: Geometry) -> dict[str, Any]:
        return {
            "num_layers": geometry.layers,
            "num_attention_heads": geometry.num_kv_heads,
            "token_dim": geometry.width,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        peft_settings(config, ignored={"modules_to_save": None})
        return cls(tokens=number(config, "num_virtual_tokens", 0))
