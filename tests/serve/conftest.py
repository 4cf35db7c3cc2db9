"""A small random model behind the server's application, called in process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import httpx2 as httpx
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from plait.decode.speculate import SPECULATORS
from plait.engine import LanguageModel
from plait.memory import MemoryPlan
from plait.nn import Transformer
from plait.nn.mixers import AttentionConfig
from plait.nn.rotary import RopeConfig
from plait.serve import Settings, create_app
from plait.text import ChatTemplate, Tokenizer
from small_models import small_transformer

T = TypeVar("T")


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """Ids are bytes: 0 ends a text, 1..256 are the bytes."""
    pieces = ["<end>", *sorted(ByteLevel.alphabet())]
    return Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.token_type": [3] + [1] * 256,
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.eos_token_id": 0,
        }
    )


@pytest.fixture(scope="session")
def small_model() -> Transformer:
    """Two blocks of random weights."""
    mixer = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, rope=RopeConfig(theta=10000.0, dim=16))
    return small_transformer(
        mixer, mixer, seed=3, vocab_size=257, width=64, inner=96, max_positions=512, logit_scale=3.0
    )


@pytest.fixture(scope="session")
def make_small(small_model: Transformer, byte_tokenizer: Tokenizer) -> Callable[..., LanguageModel]:
    """Make a language model around the small random transformer."""

    def make(memory: str = "full", draft: str = "none") -> LanguageModel:
        return LanguageModel(
            name="small",
            model=small_model,
            tokenizer=byte_tokenizer,
            chat_template=ChatTemplate.plain(),
            plan=MemoryPlan.parse(memory),
            draft=SPECULATORS.parse(draft),
        )

    return make


@contextlib.asynccontextmanager
async def running_app(
    lm: LanguageModel, settings: Settings | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, in process; the engine runs as long as the block."""
    app = create_app(lm, settings)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            client.app = app  # type: ignore[attr-defined]
            yield client


@pytest.fixture
def serve(make_small: Callable[..., LanguageModel]) -> Callable[..., Any]:
    """Run an async function with a client of a server of the small model."""

    def run(
        talk: Callable[[httpx.AsyncClient], Awaitable[T]],
        *,
        memory: str = "full",
        draft: str = "none",
        **settings: Any,
    ) -> T:
        async def main() -> T:
            async with running_app(make_small(memory, draft), Settings(**settings)) as client:
                return await talk(client)

        return asyncio.run(main())

    return run
