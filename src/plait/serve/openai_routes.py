"""The routes of OpenAI's interface: models, completions, chat, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from plait.decode import Choice
from plait.engine import Generation
from plait.serve.answers import Form, stream, whole
from plait.serve.errors import HTTPError
from plait.serve.formats import ChatLogprobs, CompletionLogprobs, Envelope
from plait.serve.routes import ERRORS, STREAMED, service_of, tenant_of
from plait.serve.running import Running
from plait.serve.schema import ChatRequest, CompletionRequest, EmbeddingsRequest, GenerationOptions
from plait.serve.service import Service

__all__ = ["router"]

router = APIRouter(prefix="/v1", responses=ERRORS)

# OpenAI's default length of a completion; a chat answer ends by itself.
_COMPLETION_TOKENS = 16


@router.get("/models")
async def models(http: Request) -> dict[str, Any]:
    """List the model that is loaded."""
    return {"object": "list", "data": [_model(service_of(http))]}


@router.get("/models/{model:path}")
async def model(http: Request, model: str) -> dict[str, Any]:
    """Describe the model that is loaded."""
    service = service_of(http)
    service.check_model(model)
    return _model(service)


@router.post("/completions", responses=STREAMED)
async def completions(http: Request, body: CompletionRequest) -> Response:
    """Continue a prompt, or several."""
    service = service_of(http)
    service.check_model(body.model)
    tokenizer = service.lm.tokenizer
    prompts = await _prompts(service, body)
    count, told = max(body.n or 1, body.best_of or 1), body.n or 1
    needs_ranking = count > told
    running = await _start(
        service,
        http,
        prompts,
        body,
        count=count,
        max_new_tokens=_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=(body.logprobs or 0) if needs_ranking else body.logprobs,
    )
    echoed = [tokenizer.decode(prompt) if body.echo else "" for prompt in prompts]
    reporters = [
        CompletionLogprobs(tokenizer, len(echoed[index // told])) for index in range(told * len(prompts))
    ]

    def choice(index: int, text: str, reason: str | None, choices: Sequence[Choice]) -> dict[str, Any]:
        logprobs = None if body.logprobs is None else reporters[index](choices)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def whole_choice(index: int, text: str, reason: str | None, choices: Sequence[Choice]) -> dict[str, Any]:
        return choice(index, echoed[index // told] + text, reason, choices)

    def rank(answers: list[Generation]) -> list[Generation]:
        groups = [answers[start : start + count] for start in range(0, len(answers), count)]
        return [one for group in groups for one in sorted(group, key=_mean_logprob, reverse=True)[:told]]

    form = Form(
        Envelope("cmpl", "text_completion", service.model_name),
        whole_choice,
        choice,
        (lambda index: choice(index, echoed[index // told], None, ())) if body.echo else None,
        rank if needs_ranking else None,
    )
    return await _respond(service, http, running, prompts, body, form)


@router.post("/chat/completions", responses=STREAMED)
async def chat(http: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    service = service_of(http)
    service.check_model(body.model)
    prompt = await service.encode_chat([message.plain() for message in body.messages])
    running = await _start(
        service,
        http,
        [prompt],
        body,
        count=body.n or 1,
        max_new_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    report = ChatLogprobs(service.lm.tokenizer)

    def told(
        index: int, key: str, said: Any, reason: str | None, choices: Sequence[Choice]
    ) -> dict[str, Any]:
        logprobs = report(choices) if body.logprobs else None
        return {"index": index, key: said, "logprobs": logprobs, "finish_reason": reason}

    def choice(index: int, text: str, reason: str | None, choices: Sequence[Choice]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return told(index, "message", message, reason, choices)

    def delta(index: int, text: str, reason: str | None, choices: Sequence[Choice]) -> dict[str, Any]:
        return told(index, "delta", {"content": text} if text else {}, reason, choices)

    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    form = Form(
        Envelope("chatcmpl", kind, service.model_name),
        choice,
        delta,
        lambda index: told(index, "delta", {"role": "assistant", "content": ""}, None, ()),
    )
    return await _respond(service, http, running, [prompt], body, form)


@router.post("/embeddings")
async def embeddings(http: Request, body: EmbeddingsRequest) -> Response:
    """Refuse: no encoder is loaded."""
    service_of(http).check_model(body.model)
    raise HTTPError(
        400,
        f"{body.model!r} generates text and has no embeddings; no encoder is loaded.",
        param="model",
        code="unsupported_model",
    )


async def _start(
    service: Service,
    http: Request,
    prompts: Sequence[list[int]],
    body: GenerationOptions,
    *,
    count: int,
    max_new_tokens: int | None,
    logprobs: int | None,
) -> Running:
    """Queue `count` sequences for each prompt."""
    most = service.settings.max_choices
    if count * len(prompts) > most:
        raise HTTPError(
            400,
            f"A request has at most {most} sequences, prompts times n or best_of. Got {count * len(prompts)}.",
            param="n",
        )
    http.scope["state"]["log"] |= {"user": body.user} if body.user else {}
    constraint = await service.constraint(body)
    requests = [
        await service.request(
            tenant_of(http),
            prompt,
            body,
            max_new_tokens=max_new_tokens,
            logprobs=logprobs,
            constraint=constraint,
            branch=branch,
        )
        for prompt in prompts
        for branch in range(count)
    ]
    return Running(service, requests)


async def _respond(
    service: Service,
    http: Request,
    running: Running,
    prompts: Sequence[Sequence[int]],
    body: GenerationOptions,
    form: Form,
) -> Response:
    if body.stream:
        counts = body.stream_options is not None and body.stream_options.include_usage
        return stream(service, http, running, prompts, form, include_usage=counts)
    return await whole(service, http, running, prompts, form)


async def _prompts(service: Service, body: CompletionRequest) -> list[list[int]]:
    """The prompts of a completion as token ids."""
    given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if isinstance(given[0], int):
        given = [given]
    if len(given) > service.settings.max_choices:
        raise HTTPError(
            400,
            f"A request has at most {service.settings.max_choices} prompts. Got {len(given)}.",
            param="prompt",
        )
    return [await service.encode(one) if isinstance(one, str) else list(one) for one in given]


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.model_name, "object": "model", "created": service.created, "owned_by": "plait"}


def _mean_logprob(answer: Generation) -> float:
    return sum(choice.logprob or 0.0 for choice in answer.choices) / max(len(answer.choices), 1)
