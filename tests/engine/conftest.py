"""A small random model with a real tokenizer, and the real SmolLM2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from plait.decode.speculate import SPECULATORS, DraftBudget
from plait.engine import LanguageModel, load
from plait.memory import MemoryPlan
from plait.nn import Transformer
from plait.nn.checkpoints.gguf import GGUFCheckpoint
from plait.nn.lowered import lower
from plait.nn.mixers import AttentionConfig
from plait.nn.rotary import RopeConfig
from plait.text import Tokenizer
from plait.weights.ggml import Q8_0
from small_models import small_transformer


@pytest.fixture(scope="session")
def packed_model() -> Transformer:
    """The same shape in 8 bits, as one native program where the operations are available."""
    mixer = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, rope=RopeConfig(theta=10000.0, dim=16))
    with torch.no_grad():
        model = small_transformer(
            mixer,
            mixer,
            seed=3,
            vocab_size=257,
            width=64,
            inner=96,
            max_positions=512,
            format=Q8_0(),
            logit_scale=3.0,
        )
    lower(model)
    return model


@pytest.fixture
def make_packed(packed_model: Transformer, byte_tokenizer: Tokenizer) -> Callable[..., LanguageModel]:
    """Make a language model around the small packed transformer."""
    return partial(_around, packed_model, byte_tokenizer)


@pytest.fixture
def make_small(small_model: Transformer, byte_tokenizer: Tokenizer) -> Callable[..., LanguageModel]:
    """Make a language model around the small random transformer."""
    return partial(_around, small_model, byte_tokenizer)


def _around(
    model: Transformer, tokenizer: Tokenizer, memory: str = "full", draft: str = "none"
) -> LanguageModel:
    lm = LanguageModel(
        name="small",
        model=model,
        tokenizer=tokenizer,
        chat_template=None,
        plan=MemoryPlan.parse(memory),
        draft=SPECULATORS.parse(draft),
    )
    if "budget=" not in draft:
        # What is scored must not depend on the time that this machine takes.
        lm.draft_budget = DraftBudget("off")
    return lm


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> LanguageModel:
    """The real SmolLM2-135M-Instruct."""
    return load(smollm2_gguf, weights="fp32")


@pytest.fixture(scope="session")
def smollm2_tokenizer_of_engine(smollm2: LanguageModel) -> Tokenizer:
    """The tokenizer of SmolLM2, byte-level BPE."""
    return smollm2.tokenizer


@pytest.fixture(scope="session")
def gemma3_tokenizer_of_engine(gemma3_gguf: Path) -> Tokenizer:
    """The tokenizer of Gemma 3, SentencePiece BPE."""
    with GGUFCheckpoint(gemma3_gguf) as checkpoint:
        return Tokenizer.from_gguf(checkpoint.metadata)
