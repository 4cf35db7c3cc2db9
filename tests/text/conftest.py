"""Metadata and tokenizers of the two real models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from plait.nn.checkpoints.gguf import GGUFCheckpoint
from plait.text import Tokenizer


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_gguf: Path) -> Mapping[str, Any]:
    with GGUFCheckpoint(smollm2_gguf) as checkpoint:
        return dict(checkpoint.metadata)


@pytest.fixture(scope="session")
def gemma3_metadata(gemma3_gguf: Path) -> Mapping[str, Any]:
    with GGUFCheckpoint(gemma3_gguf) as checkpoint:
        return dict(checkpoint.metadata)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_metadata: Mapping[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(smollm2_metadata)


@pytest.fixture(scope="session")
def gemma3_tokenizer(gemma3_metadata: Mapping[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(gemma3_metadata)
