"""Sessions over HTTP: the same as `plait.load(...).session()`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from plait.decode import Choice
from plait.engine import Generation
from plait.errors import ConfigError
from plait.serve.answers import Form, stream, whole
from plait.serve.formats import CompletionLogprobs, Envelope
from plait.serve.routes import ERRORS, STREAMED, service_of, tenant_of
from plait.serve.schema import (
    EditRequest,
    ForkRequest,
    NewSessionRequest,
    ParallelRequest,
    ReadRequest,
    RewindRequest,
    SessionGenerateRequest,
)
from plait.serve.sessions import ServedSession

__all__ = ["router"]

router = APIRouter(prefix="/v1/sessions", responses=ERRORS)


@router.post("", status_code=201)
async def create(http: Request, body: NewSessionRequest) -> dict[str, Any]:
    """Open a session, with a text that it reads first."""
    service, tenant = service_of(http), tenant_of(http)
    service.sessions.check_count(tenant, 1)
    session = service.lm.session()
    if body.text:
        session.read_tokens(await _new_tokens(http, [], body.text))
    (one,) = service.sessions.add(tenant, [session])
    return one.to_json()


@router.get("")
async def sessions(http: Request) -> dict[str, Any]:
    """List the sessions of this key."""
    found = service_of(http).sessions.of(tenant_of(http))
    return {"object": "list", "data": [one.to_json() for one in found]}


@router.get("/{session}")
async def session(http: Request, session: str) -> dict[str, Any]:
    """Show a session, with its text."""
    return _find(http, session).to_json(with_text=True)


@router.post("/{session}/read")
async def read(http: Request, session: str, body: ReadRequest) -> dict[str, Any]:
    """Append a text. It is fed to the model when something is generated."""
    one = _find(http, session)
    async with service_of(http).sessions.using(one) as own:
        own.read_tokens(await _new_tokens(http, own.tokens, body.text))
    return one.to_json()


@router.post("/{session}/generate", responses=STREAMED)
async def generate(http: Request, session: str, body: SessionGenerateRequest) -> Response:
    """Continue a session; the answer becomes part of it.

    Of a stream that ends early, what was said stays. A whole answer that is refused, fails, or has nobody any more to
    take it, leaves the session as it was, its text left out.
    """
    service, one = service_of(http), _find(http, session)
    constraint = await service.constraint(body)
    using = service.sessions.using(one)
    own = await using.__aenter__()
    before = len(own.tokens)
    try:
        if body.text:
            own.read_tokens(await _new_tokens(http, own.tokens, body.text))
        prompt = list(own.tokens)
        request = await service.request(
            one.tenant,
            prompt,
            body,
            max_new_tokens=body.max_tokens,
            logprobs=body.logprobs,
            constraint=constraint,
        )
        running = service.sessions.run(one, request)
    except BaseException:
        try:
            own.rewind(before)
        finally:
            await using.__aexit__(None, None, None)
        raise
    report = CompletionLogprobs(service.lm.tokenizer)

    def choice(index: int, text: str, reason: str | None, choices: Sequence[Choice]) -> dict[str, Any]:
        logprobs = None if body.logprobs is None else report(choices)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    form = Form(Envelope("sess", "session.answer", service.model_name), choice, choice)
    if body.stream:

        async def keep_said(taken: list[list[Choice]]) -> dict[str, Any]:
            try:
                service.sessions.keep(one, taken[0])
            finally:
                await using.__aexit__(None, None, None)
            return {}

        counts = body.stream_options is not None and body.stream_options.include_usage
        return stream(service, http, running, [prompt], form, include_usage=counts, after=keep_said)

    async def keep(answers: list[Generation]) -> dict[str, Any]:
        service.sessions.keep(one, list(answers[0].choices))
        return {"session": one.to_json()}

    try:
        return await whole(service, http, running, [prompt], form, keep)
    except BaseException:
        own.rewind(before)
        raise
    finally:
        await using.__aexit__(None, None, None)


@router.post("/{session}/edit")
async def edit(http: Request, session: str, body: EditRequest) -> dict[str, Any]:
    """Replace a span of characters, reading only what changed."""
    one = _find(http, session)
    _check_length(http, len(one.session.tokens), body.text)
    sessions = service_of(http).sessions
    report = await sessions.change(
        one, lambda own: own.edit(body.start, body.end, body.text, refresh=body.refresh)
    )
    return {**one.to_json(), "edit": report._asdict()}


@router.post("/{session}/fork", status_code=201)
async def fork(http: Request, session: str, body: ForkRequest) -> dict[str, Any]:
    """Make sessions with the same beginning; they share what is stored."""
    sessions, tenant, one = service_of(http).sessions, tenant_of(http), _find(http, session)
    sessions.check_count(tenant, body.count)
    twins = await sessions.change(one, lambda own: own.fork(body.count))
    return {"object": "list", "data": [twin.to_json() for twin in sessions.add(tenant, twins)]}


@router.post("/{session}/read_parallel")
async def read_parallel(http: Request, session: str, body: ParallelRequest) -> dict[str, Any]:
    """Read texts apart from each other, to be used together."""
    one = _find(http, session)
    _check_length(http, len(one.session.tokens), body.prefix, *body.texts)
    report = await service_of(http).sessions.change(
        one,
        lambda own: own.read_parallel(
            body.texts, prefix=body.prefix, temperature=body.temperature, scale=body.scale
        ),
    )
    return {**one.to_json(), "contexts": report._asdict()}


@router.post("/{session}/rewind")
async def rewind(http: Request, session: str, body: RewindRequest) -> dict[str, Any]:
    """Go back to the first tokens."""
    one = _find(http, session)
    async with service_of(http).sessions.using(one) as own:
        own.rewind(body.length)
    return one.to_json()


@router.delete("/{session}")
async def delete(http: Request, session: str) -> Response:
    """Close a session and free what it remembers."""
    one = _find(http, session)
    service_of(http).sessions.delete(one)
    return JSONResponse({"id": one.id, "object": "session", "deleted": True})


def _find(http: Request, id: str) -> ServedSession:
    return service_of(http).sessions.find(tenant_of(http), id)


async def _new_tokens(http: Request, before: Sequence[int], text: str) -> list[int]:
    """Token ids of a text behind what was read.

    Raises:
        ConfigError: the session would be longer than a prompt may be.
    """
    service = service_of(http)
    ids = await service.encode(text, add_special=not before)
    longest = service.lm.plan.longest(service.lm.model.config.max_positions)
    if service.settings.max_prompt_tokens is not None:
        longest = min(longest, service.settings.max_prompt_tokens + 1)
    if len(before) + len(ids) >= longest:
        raise ConfigError(
            f"The session has {len(before)} tokens and {len(ids)} would come; it may have {longest - 1}. "
            "Shorten the text, or rewind the session."
        )
    service.sessions.check_bytes(0)
    return ids


def _check_length(http: Request, tokens: int, *texts: str) -> None:
    """Refuse texts that could not fit beside each other, before any is read."""
    service = service_of(http)
    service.sessions.check_bytes(0)
    most = service.settings.max_prompt_tokens or service.lm.model.config.max_positions
    # A token of text has at most a few dozen bytes, and one byte at least.
    count = sum(len(service.lm.tokenizer.encode(text)) for text in texts)
    if tokens + count > 2 * most:
        raise ConfigError(
            f"{tokens} tokens were read and {count} would come; at most {2 * most} may. Shorten the texts."
        )
