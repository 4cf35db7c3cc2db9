"""Routes beside OpenAI's: tokens, drafts, health, numbers, and what the playground shows."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from plait.claims import Store, all_claims, read_ledger
from plait.serve.errors import HTTPError
from plait.serve.routes import ERRORS, service_of, tenant_of
from plait.serve.schema import DetokenizeRequest, DraftsRequest, TokenizeRequest

__all__ = ["router"]

router = APIRouter(responses=ERRORS)


@router.get("/health")
async def health(http: Request) -> dict[str, str]:
    """Say that the server answers; the only route of data that needs no key."""
    if not service_of(http).engine.is_open:
        raise HTTPError(503, "The engine is not running.")
    return {"status": "ok"}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(http: Request) -> Response:
    """Numbers for Prometheus."""
    service = service_of(http)
    await service.status()
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/status")
async def status(http: Request) -> dict[str, Any]:
    """What is loaded, and what the engine does now."""
    return await service_of(http).status()


@router.get("/v1/claims")
async def claims() -> dict[str, Any]:
    """The ledger: every claim beside what was measured on this machine."""
    rows = await asyncio.to_thread(lambda: read_ledger(all_claims().values(), Store()))
    return {"object": "list", "data": [row.to_json() for row in rows]}


@router.post("/tokenize")
async def tokenize(http: Request, body: TokenizeRequest) -> dict[str, Any]:
    """Token ids of a text, and the bytes of each in hex."""
    service = service_of(http)
    ids = await service.encode(body.text, add_special=body.add_special)
    shown = service.lm.tokenizer.shown_bytes
    return {"tokens": ids, "count": len(ids), "bytes": [shown(id, skip_special=False).hex() for id in ids]}


@router.post("/detokenize")
async def detokenize(http: Request, body: DetokenizeRequest) -> dict[str, Any]:
    """The text of token ids."""
    return {"text": service_of(http).lm.tokenizer.decode(body.tokens)}


@router.post("/v1/drafts")
async def drafts(http: Request, body: DraftsRequest) -> dict[str, Any]:
    """Several short drafts of what may follow, for one forward pass a token (superposed decoding)."""
    service = service_of(http)
    prompt = await service.encode(body.prompt)
    longest = service.settings.max_prompt_tokens
    if longest is not None and len(prompt) > longest:
        raise HTTPError(
            400, f"A prompt has at most {longest} tokens here. Got {len(prompt)}.", param="prompt"
        )
    candidates = min(3 * body.num_drafts, service.lm.model.config.vocab_size)
    found = await service.beside(
        tenant_of(http),
        lambda: service.lm.suggest(
            prompt,
            max_new_tokens=body.max_tokens,
            num_drafts=body.num_drafts,
            num_candidates=candidates,
        ),
    )
    return {
        "object": "list",
        "data": [{"text": one.text, "tokens": list(one.tokens), "logprob": one.logprob} for one in found],
    }
