"""What all tests share: the real models, a deterministic start, poisoned memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

from plait.hub import resolve
from plait.nn import Transformer
from plait.nn.mixers import AttentionConfig
from plait.nn.rotary import RopeConfig
from plait.text import Tokenizer
from small_models import small_transformer


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1; downloaded once."""
    return resolve("smollm2")


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    """Gemma-3-270M, Q4_K_M; downloaded once."""
    return resolve("gemma3-270m")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised floating-point tensors with NaN, so that reading what nobody wrote fails loudly."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges, read as a GGUF file would describe it: 0 ends a text, 1..256 are the bytes."""
    return Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": ["<end>", *sorted(ByteLevel.alphabet())],
            "tokenizer.ggml.token_type": [3] + [1] * 256,
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.eos_token_id": 0,
        }
    )


@pytest.fixture(scope="session")
def small_model() -> Transformer:
    """Two blocks of random weights, for the ids of `byte_tokenizer`, whose logits vary by several units."""
    mixer = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, rope=RopeConfig(theta=10000.0, dim=16))
    return small_transformer(
        mixer, mixer, seed=3, vocab_size=257, width=64, inner=96, max_positions=512, logit_scale=3.0
    )
