"""From running sequences to responses, whole or streamed; every route that generates ends here."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from plait.decode import Choice
from plait.engine import Generation
from plait.serve.errors import HTTPError, error_body, error_of
from plait.serve.events import EventStream, event, unless_gone
from plait.serve.formats import Envelope, trace_json, usage
from plait.serve.logs import logger
from plait.serve.running import Running
from plait.serve.service import Service

__all__ = ["Form", "stream", "whole"]


class Form(NamedTuple):
    """How the answers of one request are told.

    Attributes:
        envelope: what all parts have in common.
        choice: the `choices` entry of a whole answer from its index, text, finish reason and tokens.
        delta: the same for a piece of a stream; the finish reason is None before the end.
        opening: what a stream begins with for each choice; None for nothing.
        rank: which answers are returned, and in which order, from all that were made.
    """

    envelope: Envelope
    choice: Callable[[int, str, str | None, Sequence[Choice]], dict[str, Any]]
    delta: Callable[[int, str, str | None, Sequence[Choice]], dict[str, Any]]
    opening: Callable[[int], dict[str, Any]] | None = None
    rank: Callable[[list[Generation]], list[Generation]] | None = None


async def whole(
    service: Service,
    http: Request,
    running: Running,
    prompts: Sequence[Sequence[int]],
    form: Form,
    after: Callable[[list[Generation]], Awaitable[dict[str, Any]]] | None = None,
) -> Response:
    """The whole answer, once it is there. The client's going away cancels it.

    Args:
        after: called with the answers before they are told; what it returns is added to the response.
    """
    try:
        answers = await unless_gone(http.receive, running.results())
        if answers is None:
            raise HTTPError(499, "The client went away.")
        more = {} if after is None else await after(answers)
    finally:
        await running.close()
    told = answers if form.rank is None else form.rank(answers)
    _note(service, http, prompts, answers)
    choices = [form.choice(index, one.text, one.finish_reason, one.choices) for index, one in enumerate(told)]
    return JSONResponse(form.envelope.wrap(choices, usage=usage(prompts, answers), **more))


def stream(
    service: Service,
    http: Request,
    running: Running,
    prompts: Sequence[Sequence[int]],
    form: Form,
    *,
    include_usage: bool,
    after: Callable[[list[list[Choice]]], Awaitable[dict[str, Any]]] | None = None,
) -> EventStream:
    """The answer piece by piece.

    Args:
        include_usage: end with a chunk that counts tokens.
        after: called with the tokens of each answer when the stream ends, for whatever reason; what it returns
            is added to the last chunk.
    """
    taken: list[list[Choice]] = [[] for _ in running.streams]

    async def events() -> AsyncGenerator[bytes, None]:
        chunk = form.envelope.wrap
        extra: dict[str, Any] = {"usage": None} if include_usage else {}
        try:
            for index in range(len(running.streams)):
                if form.opening is not None:
                    yield event(chunk([form.opening(index)], **extra))
            async for index, piece in running.pieces():
                taken[index] += piece.choices
                more = dict(extra)
                if piece.trace is not None:
                    more["trace"] = trace_json(piece.trace, service.lm.tokenizer)
                if piece.text or piece.choices or piece.finish_reason:
                    said = form.delta(index, piece.text, piece.finish_reason, piece.choices)
                    yield event(chunk([said], **more))
            answers = [await one.result() for one in running.streams]
            if include_usage:
                yield event(chunk([], usage=usage(prompts, answers)))
            _note(service, http, prompts, answers)
            yield event("[DONE]")
        except Exception as error:  # noqa: BLE001 - the status is sent, so the error goes into the stream
            told = error_of(error)
            if told.status >= 500:
                logger.exception("error in a stream")
            yield event(error_body(told))

    async def close() -> None:
        await running.close()
        if after is not None:
            await after(taken)

    settings = service.settings
    return EventStream(
        events(), close, ping_seconds=settings.ping_seconds, send_seconds=settings.send_seconds
    )


def _note(
    service: Service, http: Request, prompts: Sequence[Sequence[int]], answers: Sequence[Generation]
) -> None:
    """Give the log what it may know of an answer."""
    log: dict[str, Any] = http.scope["state"]["log"]
    log["prompt_tokens"] = sum(map(len, prompts))
    log["new_tokens"] = sum(len(answer.tokens) for answer in answers)
    log["first_token_seconds"] = round(min(answer.seconds_to_first_token for answer in answers), 4)
    if service.settings.log_prompts:
        log["prompts"] = [service.lm.tokenizer.decode(prompt) for prompt in prompts]
        log["answers"] = [answer.text for answer in answers]
