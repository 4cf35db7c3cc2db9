"""Sessions and drafts over HTTP do what the library's do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import pytest

from plait.engine import LanguageModel

Serve = Callable[..., Any]
TEXT = "one two three four five six seven"
OPTIONS = {"max_tokens": 6, "temperature": 0, "ignore_end": True}


async def call(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int = 200
) -> dict[str, Any]:
    answer = await client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return dict(answer.json())


async def open_session(client: httpx.AsyncClient, text: str = TEXT) -> str:
    return str((await call(client, "/v1/sessions", {"text": text}, 201))["id"])


def test_a_session_continues_forks_and_rewinds_as_in_the_library(
    serve: Serve, make_small: Callable[..., LanguageModel]
) -> None:
    with make_small().session() as own:
        own.read(TEXT)
        first = own.generate(max_new_tokens=6, temperature=0, ignore_end=True)
        (twin,) = own.fork()
        second = twin.generate(" more", max_new_tokens=6, temperature=0, ignore_end=True)

    async def talk(client: httpx.AsyncClient) -> None:
        path = f"/v1/sessions/{await open_session(client)}"
        answer = await call(client, f"{path}/generate", OPTIONS)
        assert answer["choices"][0]["text"] == first.text
        assert answer["session"]["tokens"] == len(TEXT) + 6
        forked = (await call(client, f"{path}/fork", {"count": 2}, 201))["data"]
        assert len(forked) == 2
        twin_path = f"/v1/sessions/{forked[0]['id']}"
        answer = await call(client, f"{twin_path}/generate", {**OPTIONS, "text": " more"})
        assert answer["choices"][0]["text"] == second.text
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(TEXT) + 6
        rewound = await call(client, f"{path}/rewind", {"length": len(TEXT)})
        assert rewound["tokens"] == len(TEXT)
        streamed = await client.post(f"{path}/generate", json={**OPTIONS, "stream": True})
        assert streamed.text.rstrip().endswith("data: [DONE]")
        assert (await client.get(path)).json()["tokens"] == len(TEXT) + 6
        assert (await client.get(path)).json()["text"].encode()[: len(TEXT)] == TEXT.encode()
        assert (await client.delete(path)).json()["deleted"]
        assert (await client.get(path)).status_code == 404
        assert len((await client.get("/v1/sessions")).json()["data"]) == 2

    serve(talk)


def test_an_edit_reads_only_what_changed(serve: Serve, make_small: Callable[..., LanguageModel]) -> None:
    text = TEXT * 6
    with make_small().session() as own:
        own.read(text)
        (own,) = own.fork()
        report = own.edit(4, 7, "TWELVE")
        after = own.generate(max_new_tokens=6, temperature=0, ignore_end=True).text

    async def talk(client: httpx.AsyncClient) -> None:
        path = f"/v1/sessions/{await open_session(client, text)}"
        edited = await call(client, f"{path}/edit", {"start": 4, "end": 7, "text": "TWELVE"})
        assert edited["edit"] == report._asdict()
        assert edited["edit"]["moved"] > 80
        assert (await client.get(path)).json()["text"] == text[:4] + "TWELVE" + text[7:]
        answer = await call(client, f"{path}/generate", OPTIONS)
        assert answer["choices"][0]["text"] == after
        await call(client, f"{path}/edit", {"start": 4, "end": 4000, "text": ""}, 400)

    serve(talk)


def test_contexts_are_read_in_parallel(serve: Serve, make_small: Callable[..., LanguageModel]) -> None:
    contexts = {"texts": ["apples are red", "plums are blue"], "prefix": "Facts: "}
    with make_small().session() as own:
        own.read_parallel(contexts["texts"], prefix="Facts: ")
        wanted = own.generate(" Q?", max_new_tokens=6, temperature=0, ignore_end=True).text

    async def talk(client: httpx.AsyncClient) -> None:
        path = f"/v1/sessions/{await open_session(client, '')}"
        assert (await call(client, f"{path}/read_parallel", contexts))["contexts"] == {
            "encoded": 28,
            "cached": 0,
        }
        answer = await call(client, f"{path}/generate", {**OPTIONS, "text": " Q?"})
        assert answer["choices"][0]["text"] == wanted

    serve(talk)


def test_a_refused_call_leaves_the_session_as_it_was(serve: Serve) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        path = f"/v1/sessions/{await open_session(client)}"
        before = (await client.get(path)).json()
        await call(client, f"{path}/read", {"text": "x" * 600}, 400)
        await call(client, f"{path}/rewind", {"length": 10_000}, 400)
        await call(client, f"{path}/generate", {**OPTIONS, "max_tokens": 100_000}, 400)
        await call(client, f"{path}/fork", {"count": 17}, 429)
        assert (await client.get(path)).json()["text"] == before["text"]
        empty = f"/v1/sessions/{await open_session(client, '')}"
        await call(client, f"{empty}/generate", OPTIONS, 400)
        assert (await call(client, f"{path}/generate", OPTIONS))["choices"][0]["finish_reason"] == "length"

    serve(talk)


def test_sessions_are_limited_in_number_bytes_and_time(serve: Serve) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        path = f"/v1/sessions/{await open_session(client)}"
        await open_session(client)
        await call(client, "/v1/sessions", {}, 429)
        await call(client, f"{path}/generate", OPTIONS, 400)
        await asyncio.sleep(0.5)
        assert (await client.get("/v1/sessions")).json()["data"] == []

    serve(talk, max_sessions_per_key=2, max_session_bytes=100, session_seconds=0.1)


def test_two_requests_cannot_use_one_session_at_once(serve: Serve) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        path = f"/v1/sessions/{await open_session(client)}"
        long = asyncio.ensure_future(call(client, f"{path}/generate", {**OPTIONS, "max_tokens": 300}))
        while (await client.get("/v1/status")).json()["engine"]["running"] == 0:
            await asyncio.sleep(0.01)
        assert (await client.post(f"{path}/read", json={"text": "x"})).status_code == 409
        assert (await client.delete(path)).status_code == 409
        await long
        assert (await client.delete(path)).status_code == 200

    serve(talk)


def test_drafts_are_those_of_the_library(serve: Serve, make_small: Callable[..., LanguageModel]) -> None:
    wanted = make_small().suggest("abc", num_drafts=2, num_candidates=6, max_new_tokens=5)

    async def talk(client: httpx.AsyncClient) -> None:
        drafts = await call(client, "/v1/drafts", {"prompt": "abc", "num_drafts": 2, "max_tokens": 5})
        assert [one["text"] for one in drafts["data"]] == [one.text for one in wanted]
        assert drafts["data"][0]["logprob"] == pytest.approx(wanted[0].logprob, abs=1e-4)

    serve(talk)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_session_whose_client_went_away_goes_on_from_what_it_says_it_holds(
    serve: Serve, make_small: Callable[..., LanguageModel], is_stream: bool
) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        app = client.app  # type: ignore[attr-defined]
        path = f"/v1/sessions/{await open_session(client)}"
        body = {**OPTIONS, "text": " and", "max_tokens": 300, "stream": is_stream}
        await leave(app, f"{path}/generate", body)
        while (await client.post(f"{path}/read", json={"text": ""})).status_code == 409:
            await asyncio.sleep(0.01)
        held = list(app.state.service.sessions.find("", path.rpartition("/")[2]).session.tokens)
        if is_stream:
            assert len(TEXT + " and") < len(held) < len(TEXT + " and") + 300
        else:
            assert len(held) == len(TEXT)
        # Long enough to reach behind everything that the engine had said.
        more = " more" * 60
        answer = await call(client, f"{path}/generate", {**OPTIONS, "text": more})
        with make_small().session() as own:
            own.read_tokens(held)
            wanted = own.generate(more, max_new_tokens=6, temperature=0, ignore_end=True)
        assert answer["choices"][0]["text"] == wanted.text

    serve(talk)


async def leave(app: Any, path: str, body: dict[str, Any]) -> None:
    """Ask, and go away in the middle of the answer."""
    gone = asyncio.Event()
    sent = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive() -> dict[str, Any]:
        if (message := next(sent, None)) is not None:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        # Slowly, so that the engine is ahead of what its client was told.
        if message["type"] == "http.response.body":
            await asyncio.sleep(0.05)
            gone.set()

    async def lose_patience() -> None:
        while (await app.state.service.status())["engine"]["running"] == 0:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        gone.set()

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    patience = asyncio.ensure_future(asyncio.sleep(0) if body["stream"] else lose_patience())
    await app(scope, receive, send)
    await patience


def test_a_refused_continuation_does_not_keep_its_text(serve: Serve) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        path = f"/v1/sessions/{await open_session(client)}"
        for wrong in ({"n": 2}, {"max_tokens": 100_000}, {"logit_bias": {"100000": 1}}):
            answer = await client.post(f"{path}/generate", json={**OPTIONS, "text": " more", **wrong})
            assert answer.status_code == 400
            assert (await client.get(path)).json()["text"] == TEXT
        for _ in range(2):
            answer = await client.post(f"{path}/generate", json={**OPTIONS, "text": " more", "max_tokens": 2})
            assert answer.status_code == 200
            await call(client, f"{path}/rewind", {"length": len(TEXT)})

    serve(talk)
