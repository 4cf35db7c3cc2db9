"""Routes for texts as such: tokens and back, short drafts, the next byte, and watermarks.

None is a request to the engine, so each bounds its own work: a text has at most `max_text_chars` characters, and
whatever asks the model waits for the one thread beside the engine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from plait.engine import ByteLM
from plait.errors import ConfigError
from plait.serve.errors import HTTPError
from plait.serve.routes import ERRORS, service_of, tenant_of
from plait.serve.schema import (
    BytesRequest,
    DetokenizeRequest,
    DraftsRequest,
    TokenizeRequest,
    WatermarkCheckRequest,
    WatermarkMarkRequest,
)
from plait.serve.service import Service

__all__ = ["router"]

router = APIRouter(responses=ERRORS)

# How a law names the end of the text, which is no byte.
_END = 256


@router.post("/tokenize")
async def tokenize(http: Request, body: TokenizeRequest) -> dict[str, Any]:
    """Token ids of a text or of a conversation, and the bytes of each in hex."""
    service = service_of(http)
    if body.messages is not None:
        ids = await service.encode_chat([message.plain() for message in body.messages])
    else:
        ids = await service.encode(body.text or "", add_special=body.add_special)
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
    service.check_prompt(prompt)
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


@router.post("/v1/bytes")
async def next_bytes(http: Request, body: BytesRequest) -> dict[str, Any]:
    """How likely each next byte of a text is, wherever the text ends; exact, not sampled.

    `steps` tells the same before each byte of `then`, and `text` is what the likeliest bytes go on to say.
    """
    service = service_of(http)
    prompt, then = _as_bytes(body.prompt, "prompt"), _as_bytes(body.then, "then")
    _check_chars(service, len(prompt))
    service.check_prompt(body.before or ())

    def work() -> dict[str, Any]:
        byte_lm = service.lm.bytes(start=body.before)
        return _laws(byte_lm, prompt, then, body.top, body.max_bytes)

    return {"object": "byte.law", **await service.beside(tenant_of(http), work)}


@router.post("/v1/watermark/mark")
async def mark(http: Request, body: WatermarkMarkRequest) -> dict[str, Any]:
    """Replace words of an English text by synonyms, so that the key finds the text again."""
    from plait.prose import Watermark

    service = service_of(http)
    lexicon = service.lexicon()
    _check_chars(service, len(body.text))
    watermark = Watermark(
        body.secret(), lexicon, service.lm, max_replaced=body.max_replaced, target_z=body.target_z
    )
    marked = await service.beside(tenant_of(http), lambda: watermark.embed(body.text))
    return {
        "object": "watermark.marked",
        "text": marked.text,
        "words": marked.words,
        "replaced": [one._asdict() for one in marked.replaced],
        **marked.detection._asdict(),
    }


@router.post("/v1/watermark/check")
async def check(http: Request, body: WatermarkCheckRequest) -> dict[str, Any]:
    """Test an English text for the mark of a key."""
    from plait.prose import Watermark

    service = service_of(http)
    lexicon = service.lexicon()
    _check_chars(service, len(body.text))
    watermark = Watermark(body.secret(), lexicon, service.lm, alpha=body.alpha)
    found = await service.beside(
        tenant_of(http), lambda: watermark.detect(body.text, mode="precise" if body.precise else "fast")
    )
    return {"object": "watermark.detection", **found._asdict()}


def _laws(byte_lm: ByteLM, prompt: bytes, then: bytes, top: int, max_bytes: int) -> dict[str, Any]:
    """The law behind a prompt, before each byte of a text that follows it, and what bytes go on to say."""
    state = byte_lm.state(prompt)
    steps = []
    for byte in then:
        law = np.exp(state.law())
        steps.append({"byte": byte, "probability": float(law[byte]), "next": _top(law, top)})
        state.push(byte)
    told: dict[str, Any] = {"steps": steps, "next": _top(np.exp(state.law()), top)}
    written = bytearray()
    while len(written) < max_bytes and (byte := int(state.law().argmax())) != _END:
        written.append(byte)
        state.push(byte)
    # Bytes that go on with a character of the prompt are a text only together with it.
    return {**told, "text": written.decode("utf-8", "replace"), "bytes": list(written)}


def _top(law: np.ndarray[Any, np.dtype[np.float64]], count: int) -> list[dict[str, Any]]:
    """The likeliest bytes, best first; null is the end of the text."""
    order = np.argsort(-law, kind="stable")[:count].tolist()
    return [{"byte": None if byte == _END else byte, "probability": float(law[byte])} for byte in order]


def _as_bytes(given: str | list[int], param: str) -> bytes:
    if isinstance(given, list):
        return bytes(given)
    try:
        return given.encode()
    except UnicodeEncodeError as error:
        raise HTTPError(
            400, f"Character {error.start} is half of a surrogate pair, which is no text.", param=param
        ) from None


def _check_chars(service: Service, count: int) -> None:
    most = service.settings.max_text_chars
    if count > most:
        raise ConfigError(f"A text has at most {most} characters here, or bytes. Got {count}.")
