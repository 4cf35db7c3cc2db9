"""Answers under a schema always validate, whatever draws or guesses the tokens."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import jsonschema
import pytest

from plait.engine import LanguageModel
from plait.errors import ConfigError
from plait.serve.json_schema import Grammars

Serve = Callable[..., Any]
# A longer run, as before a release, is PLAIT_REQUESTS=200.
REQUESTS = int(os.environ.get("PLAIT_REQUESTS", "20"))


def record(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


# Short by themselves, so that random weights come to an end.
SCHEMAS: list[dict[str, Any]] = [
    record(age={"type": "integer", "minimum": 0, "maximum": 150}),
    record(name={"type": "string", "maxLength": 8}, ok={"type": "boolean"}),
    {"enum": ["red", "green", "blue"]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    record(at=record(x={"enum": [0, 1]}, y={"enum": [0, 1]})),
    {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-z]{2,5}$"}]},
    record(code={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2}$"}),
    {"const": {"fixed": [1, 2, 3]}},
    record(kind={"const": "b"}, tags={"type": "array", "items": {"enum": ["p", "q"]}, "maxItems": 3}),
    {"$ref": "#/$defs/one", "$defs": {"one": record(value={"type": "integer", "minimum": -5, "maximum": 5})}},
]


@pytest.mark.parametrize("draft", ["none", "prompt-lookup"])
def test_answers_validate_for_every_schema_and_seed(serve: Serve, draft: str) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        async def ask(schema: dict[str, Any], seed: int) -> None:
            wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
            body = {
                "model": "small",
                "messages": [{"role": "user", "content": "x"}],
                "response_format": wanted,
            }
            body |= {"seed": seed, "temperature": seed % 3 * 0.5, "max_tokens": 200}
            answer = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
            assert answer["finish_reason"] == "stop"
            jsonschema.validate(json.loads(answer["message"]["content"]), schema)

        for schema in SCHEMAS:
            await asyncio.gather(*(ask(schema, seed) for seed in range(REQUESTS // 10)))

    serve(talk, draft=draft)


def test_json_object_is_an_object(serve: Serve) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        body = {"model": "small", "prompt": "x", "seed": 4, "max_tokens": 60, "temperature": 0.8}
        body |= {"response_format": {"type": "json_object"}}
        choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["text"]), dict)
        else:
            assert choice["text"].lstrip().startswith("{")

    serve(talk)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strin"},
        {"not": {"type": "string"}},
        {"$ref": "http://example.com/schema.json"},
        {"type": "string", "pattern": "(?=x)y"},
        {"type": "object", "properties": []},
        {"enum": ["x" * 70000]},
    ],
    ids=["unknown type", "not", "remote", "look-ahead", "list", "large"],
)
def test_a_schema_that_cannot_be_enforced_is_refused_and_the_next_request_works(
    serve: Serve, schema: dict[str, Any]
) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        body = {"model": "small", "prompt": "x", "max_tokens": 2}
        bad = await client.post("/v1/completions", json={**body, "response_format": wanted})
        assert bad.status_code == 400, bad.text
        assert "JSON schema" in bad.json()["error"]["message"]
        assert (await client.post("/v1/completions", json=body)).status_code == 200

    serve(talk)


def test_a_guide_goes_back_and_says_nothing_of_what_it_forbids(
    make_small: Callable[..., LanguageModel],
) -> None:
    lm = make_small()
    guide = Grammars(lm.tokenizer, 257).of_schema({"enum": ["ab", "ac"]}).start()
    quote, a, b, c = (lm.tokenizer.encode(text)[0] for text in '"abc')
    begin = guide.allowed([])
    assert begin is not None
    assert begin.shape == (257,)
    assert begin[quote]
    assert not begin[a]
    assert set(_ids(guide.allowed([quote, a]))) >= {b, c}
    assert _ids(guide.allowed([quote, a, b])) == [quote]
    assert set(_ids(guide.allowed([quote]))) >= {a}
    assert guide.allowed([quote, b]) is None
    assert 0 in _ids(guide.allowed([quote, a, c, quote]))
    assert guide.allowed([quote, a, c, quote, 0]) is None
    assert set(_ids(guide.allowed([quote, a]))) >= {b, c}


def test_a_schema_is_limited_in_bytes(make_small: Callable[..., LanguageModel]) -> None:
    grammars = Grammars(make_small().tokenizer, 257, max_bytes=30)
    with pytest.raises(ConfigError, match="at most 30 bytes"):
        grammars.of_schema({"enum": ["a" * 30]})


def _ids(mask: Any) -> list[int]:
    assert mask is not None
    return [index for index, is_allowed in enumerate(mask) if is_allowed]
