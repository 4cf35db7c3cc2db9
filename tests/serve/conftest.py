"""A small random model behind the server's application, called in process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import httpx2 as httpx
import pytest

from plait.decode.speculate import SPECULATORS
from plait.engine import LanguageModel
from plait.memory import MemoryPlan
from plait.nn import Transformer
from plait.serve import Settings, create_app
from plait.text import ChatTemplate, Tokenizer

T = TypeVar("T")


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
