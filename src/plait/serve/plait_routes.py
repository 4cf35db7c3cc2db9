"""How the server is: health, numbers, and what the playground shows."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from plait.claims import Store, all_claims, read_ledger
from plait.serve.errors import HTTPError
from plait.serve.routes import ERRORS, service_of

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
