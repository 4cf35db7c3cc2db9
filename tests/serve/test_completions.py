"""Completions and chat: every field does what it says, whole and streamed."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import pytest

from plait.engine import LanguageModel

Serve = Callable[..., Any]
# A longer run, as before a release, is PLAIT_REQUESTS=200.
REQUESTS = int(os.environ.get("PLAIT_REQUESTS", "20"))


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "small", "prompt": "abcabc", "max_tokens": 8, "seed": 1, **fields}


def chat(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "abc"}]
    return {"model": "small", "messages": messages, "max_tokens": 8, "seed": 1, **fields}


async def post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def events(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in answer.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def joined(chunks: list[dict[str, Any]], count: int = 1) -> list[str]:
    texts = [""] * count
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return texts


@pytest.mark.parametrize("draft", ["none", "prompt-lookup"])
def test_a_streamed_text_is_the_whole_text_for_many_seeds(serve: Serve, draft: str) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        async def both(seed: int) -> None:
            ask = completion(seed=seed, n=1 + seed % 3, max_tokens=4 + seed % 20, temperature=seed % 4 / 2)
            ask["stop"] = ["a", "q0"] if seed % 5 == 0 else None
            body = await post(client, "/v1/completions", ask)
            wanted = [choice["text"] for choice in body["choices"]]
            chunks = await events(client, "/v1/completions", ask)
            assert joined(chunks, len(wanted)) == wanted
            ends = {
                c["index"]: c["finish_reason"]
                for chunk in chunks
                for c in chunk["choices"]
                if c["finish_reason"]
            }
            assert ends == {choice["index"]: choice["finish_reason"] for choice in body["choices"]}

        for start in range(0, REQUESTS // 2, 10):
            await asyncio.gather(*(both(seed) for seed in range(start, start + 10)))

    serve(talk, draft=draft)


def test_an_answer_is_that_of_the_library(serve: Serve, make_small: Callable[..., LanguageModel]) -> None:
    lm = make_small()
    options = {
        "temperature": 0.7,
        "seed": 5,
        "top_p": 0.9,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
    }

    async def talk(client: httpx.AsyncClient) -> None:
        body = await post(client, "/v1/completions", completion(**options))
        assert body["choices"][0]["text"] == lm.generate("abcabc", max_new_tokens=8, **options).text
        body = await post(client, "/v1/chat/completions", chat(**options))
        messages = chat()["messages"]
        assert body["choices"][0]["message"]["content"] == lm.chat(messages, max_new_tokens=8, **options).text

    serve(talk)


def test_prompts_in_every_form_give_the_same(serve: Serve, make_small: Callable[..., LanguageModel]) -> None:
    ids = make_small().encode("abcabc")

    async def talk(client: httpx.AsyncClient) -> None:
        forms = ["abcabc", ["abcabc"], ids, [ids]]
        texts = [await post(client, "/v1/completions", completion(prompt=form)) for form in forms]
        assert len({answer["choices"][0]["text"] for answer in texts}) == 1
        both = await post(client, "/v1/completions", completion(prompt=["abcabc", "xyz"], n=2))
        assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
        assert both["choices"][0]["text"] == texts[0]["choices"][0]["text"]
        assert both["choices"][0]["text"] != both["choices"][1]["text"]
        assert both["usage"]["prompt_tokens"] == 9

    serve(talk)


def test_logprobs_are_of_the_tokens_and_offsets_lead_to_them(serve: Serve) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        ask = completion(logprobs=3, temperature=0, max_tokens=6)
        choice = (await post(client, "/v1/completions", ask))["choices"][0]
        told = choice["logprobs"]
        assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"]) == 6
        for token, logprob, best in zip(
            told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True
        ):
            assert logprob == max(best.values())
            assert token in best
        streamed = [c["choices"][0]["logprobs"] for c in await events(client, "/v1/completions", ask)]
        assert [token for part in streamed for token in part["tokens"]] == told["tokens"]
        assert [offset for part in streamed for offset in part["text_offset"]] == told["text_offset"]
        answer = await post(
            client, "/v1/chat/completions", chat(logprobs=True, top_logprobs=2, temperature=0)
        )
        content = answer["choices"][0]["logprobs"]["content"]
        assert len(content) == 8
        assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in content)
        assert (
            b"".join(bytes(entry["bytes"]) for entry in content).decode("utf-8", "replace")
            == (answer["choices"][0]["message"]["content"])
        )

    serve(talk)


def test_best_of_returns_the_likeliest_of_what_n_would_give(serve: Serve) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        all_of_them = await post(client, "/v1/completions", completion(n=5, logprobs=0))
        ranked = sorted(
            all_of_them["choices"],
            key=lambda c: -sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["token_logprobs"]),
        )
        best = await post(client, "/v1/completions", completion(n=2, best_of=5))
        assert [c["text"] for c in best["choices"]] == [c["text"] for c in ranked[:2]]
        assert best["usage"]["completion_tokens"] == all_of_them["usage"]["completion_tokens"]
        assert best["choices"][0]["logprobs"] is None

    serve(talk)


def test_stop_echo_bias_and_usage(serve: Serve) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        plain = (await post(client, "/v1/completions", completion(temperature=0)))["choices"][0]
        stop = plain["text"][3:5]
        stopped = (await post(client, "/v1/completions", completion(temperature=0, stop=stop)))["choices"][0]
        assert stopped["text"] == plain["text"][: plain["text"].index(stop)]
        assert (plain["finish_reason"], stopped["finish_reason"]) == ("length", "stop")
        echoed = await post(client, "/v1/completions", completion(temperature=0, echo=True))
        assert echoed["choices"][0]["text"] == "abcabc" + plain["text"]
        chunks = await events(client, "/v1/completions", completion(temperature=0, echo=True))
        assert joined(chunks) == ["abcabc" + plain["text"]]
        (ids,) = {tuple((await client.post("/tokenize", json={"text": "Z"})).json()["tokens"])}
        biased = await post(
            client, "/v1/completions", completion(temperature=0, logit_bias={str(ids[0]): 100})
        )
        assert biased["choices"][0]["text"] == "Z" * 8
        options = {"stream_options": {"include_usage": True}}
        *chunks, last = await events(client, "/v1/completions", completion(**options))
        assert all(chunk["usage"] is None for chunk in chunks)
        assert last["choices"] == []
        assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (6, 8)

    serve(talk)


def test_a_traced_stream_tells_strands_and_drafts(serve: Serve) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        chunks = await events(client, "/v1/completions", completion(trace=True, temperature=0))
        for chunk in chunks:
            assert sum(strand["weight"] for strand in chunk["trace"]["strands"]) == pytest.approx(1, abs=1e-3)
            assert chunk["trace"]["draft"]["parents"][0] == -1
        untraced = await events(client, "/v1/completions", completion(temperature=0))
        assert joined(chunks) == joined(untraced)
        assert "trace" not in untraced[0]

    serve(talk, draft="prompt-lookup")


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v1/completions", completion(suffix="x"), "suffix"),
        ("/v1/chat/completions", chat(tools=[]), "tools"),
        ("/v1/chat/completions", chat(functions=[]), "functions"),
        ("/v1/chat/completions", chat(store=False), "store"),
        ("/v1/chat/completions", chat(logprobs=True, top_logprobs=21), "top_logprobs"),
        ("/v1/chat/completions", chat(n=0), "n"),
        ("/v1/completions", completion(n=17), "n"),
        ("/v1/completions", completion(temperature=2.5), "temperature"),
        ("/v1/completions", completion(temperature="1"), "temperature"),
        ("/v1/completions", completion(logit_bias={"x": 1}), "logit_bias.x"),
        ("/v1/completions", completion(response_format={"type": "xml"}), "response_format"),
        ("/v1/completions", {"model": "small"}, "prompt"),
        ("/v1/completions", completion(prompt=[]), "prompt"),
        ("/v1/embeddings", {"model": "small", "input": "x"}, "model"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    serve: Serve, path: str, body: dict[str, Any], name: str
) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        answer = await client.post(path, json=body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["param"] == name

    serve(talk)


def test_another_model_is_404(serve: Serve) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/completions", json=completion(model="gpt-4"))
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
        assert [one["id"] for one in (await client.get("/v1/models")).json()["data"]] == ["small"]
        assert (await client.get("/v1/models/small")).json()["id"] == "small"

    serve(talk)
