"""What all routes share: the service and tenant of a request, and how errors look in the OpenAPI document."""

from __future__ import annotations

from typing import Any, cast

from fastapi import Request
from pydantic import BaseModel

from plait.serve.service import Service

__all__ = ["ERRORS", "STREAMED", "service_of", "tenant_of"]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer but success."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": description}
    for status, description in {
        400: "The request is not allowed.",
        401: "The API key is missing or wrong.",
        403: "The host or origin is not allowed.",
        404: "There is nothing of that name.",
        405: "The route takes other methods.",
        408: "The body came too slowly.",
        409: "The session is in use.",
        413: "The body is too large.",
        415: "The body is not JSON.",
        429: "Over a limit of this key; Retry-After says when to try again.",
        500: "Something went wrong in the server.",
        503: "The server is ending.",
    }.items()
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with stream: true as server-sent events.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    }
}


def service_of(http: Request) -> Service:
    """The service behind a request's app."""
    return cast(Service, http.app.state.service)


def tenant_of(http: Request) -> str:
    """On whose behalf a request is made."""
    return cast(str, http.scope["state"]["tenant"])
