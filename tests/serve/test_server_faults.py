"""What clients and machines do to a server: each fault is answered or cancelled, and the next request works."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from live import live_server

from plait.engine import LanguageModel, load
from plait.errors import ConfigError, PlaitError
from plait.serve import Settings
from plait.serve.runner import bind

Serve = Callable[..., Any]
ASK = {"model": "small", "prompt": "abc", "max_tokens": 2}
LONG = {"model": "small", "prompt": "abc", "max_tokens": 450, "ignore_end": True}

POISON: list[bytes] = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe",
    b'{"model": "small", "prompt": "\xc3"}',
    b'{"model": "small", "prompt": "\\ud800"}',
    b'{"model": "small", "prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    b'{"model": "small", "prompt": ' + b'{"a":' * 10_000,
    b'{"model": "small", "prompt": "x", "temperature": NaN}',
    b'{"model": "small", "prompt": "x", "temperature": 1e999}',
    b'{"model": "small", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    b'{"model": "small", "prompt": "x", "n": 9223372036854775807}',
    b'{"model": "small", "prompt": "x", "max_tokens": 9223372036854775807}',
    b'{"model": "small", "prompt": "x", "logprobs": -1}',
    b'{"model": "small", "prompt": "x", "logprobs": 1000000}',
    b'{"model": "small", "prompt": [-1]}',
    b'{"model": "small", "prompt": [257]}',
    b'{"model": "small", "prompt": [4294967296]}',
    b'{"model": "small", "prompt": ""}',
    b'{"model": "small", "prompt": "x", "logit_bias": {"999999": 1}}',
    b'{"model": "small", "prompt": "x", "logit_bias": {"-1": 1}}',
    b'{"model": "small", "prompt": "x", "stop": [""]}',
    b'{"model": "small", "prompt": "x", "stop": ["\\ud800"]}',
    b'{"model": "\\ud800", "prompt": "x"}',
    b'{"model": "small", "prompt": "x", "\\ud800": 1}',
    b'{"model": "small", "prompt": "x", "response_format": {"type": "json_schema", "json_schema": '
    b'{"name": "a", "schema": {"enum": ["\\ud800"]}}}}',
]


def test_a_poisoned_request_is_4xx_and_the_next_one_works(serve: Serve) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        wanted = (await client.post("/v1/completions", json={**ASK, "seed": 1})).json()["choices"]
        for body in POISON:
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/sessions"):
                headers = {"content-type": "application/json"}
                answer = await client.post(path, content=body, headers=headers)
                if path != "/v1/sessions" or body:
                    assert 400 <= answer.status_code < 500, (path, body[:80], answer.text[:200])
                    assert answer.json()["error"]["message"]
            again = (await client.post("/v1/completions", json={**ASK, "seed": 1})).json()["choices"]
            assert again == wanted
        status = (await client.get("/v1/status")).json()
        assert (status["engine"]["waiting"], status["engine"]["running"]) == (0, 0)

    serve(talk)


def test_a_body_that_is_no_json_by_name_is_refused(serve: Serve) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/completions", content=b"x=1", headers={"content-type": "text/plain"})
        assert answer.status_code == 415

    serve(talk)


def test_a_failure_inside_is_500_without_details_and_the_next_request_works(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        service = client.app.state.service  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:

            def broken(*_: Any) -> None:
                raise RuntimeError("a secret of the machine")

            patch.setattr(service.lm.tokenizer, "encode", broken)
            answer = await client.post("/v1/completions", json=ASK)
            assert answer.status_code == 500
            assert "secret" not in answer.text
        with monkeypatch.context() as patch:
            patch.setattr(service.lm_engine.model, "answer", broken)
            for body in (ASK, {**ASK, "stream": True}):
                answer = await client.post("/v1/completions", json=body)
                assert "Something went wrong" in answer.text
                assert "secret" not in answer.text
        assert (await client.post("/v1/completions", json=ASK)).status_code == 200

    serve(talk)


@pytest.fixture
def address(make_small: Callable[..., LanguageModel]) -> Iterator[str]:
    """A live server with short patience."""
    settings = Settings(port=0, body_seconds=0.5, send_seconds=0.5, max_body_bytes=2**20)
    with live_server(make_small(), settings, send_buffer=8192) as url:
        yield url


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def head(length: int, path: str = "/v1/completions") -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def status_of(talk: socket.socket) -> int:
    return int(talk.recv(4096).split(b" ", 2)[1])


def idle(url: str) -> None:
    """Wait until the engine has nothing to do and remembers nothing of its own."""
    deadline = time.monotonic() + 20
    while True:
        now = httpx.get(f"{url}/v1/status").json()["engine"]
        if now["running"] + now["waiting"] + now["memory_bytes"] - now["prefix_bytes"] == 0:
            return
        assert time.monotonic() < deadline, now
        time.sleep(0.02)


def works(url: str) -> None:
    answer = httpx.post(f"{url}/v1/completions", json=ASK, timeout=20)
    assert answer.status_code == 200
    idle(url)


def test_a_half_sent_body_is_given_up(address: str) -> None:
    with connect(address) as talk:
        talk.sendall(head(1000) + b'{"model": ')
        assert status_of(talk) == 408
    with connect(address) as talk:
        talk.sendall(head(1000) + b'{"model": ')
    works(address)


def test_a_body_of_100_mb_is_refused_before_it_is_read(address: str) -> None:
    with connect(address) as talk:
        talk.sendall(head(100 * 2**20))
        assert status_of(talk) == 413
    with connect(address) as talk:
        start = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        with contextlib.suppress(OSError):
            talk.sendall(start)
            for _ in range(1600):
                talk.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
        with contextlib.suppress(OSError):
            assert status_of(talk) == 413
    works(address)


def test_a_client_that_leaves_a_stream_frees_its_strands(address: str) -> None:
    for body in ({**LONG, "stream": True}, {**LONG, "n": 3, "stream": True}, LONG):
        content = json.dumps(body).encode()
        with connect(address) as talk:
            talk.sendall(head(len(content)) + content)
            if body.get("stream"):
                talk.recv(1024)
            else:
                time.sleep(0.1)
        idle(address)
    works(address)
    cancelled = [
        line
        for line in httpx.get(f"{address}/metrics").text.splitlines()
        if 'finish_reason="cancelled"' in line
    ]
    assert float(cancelled[0].rpartition(" ")[2]) == 5


def test_a_client_that_does_not_read_is_cancelled_and_others_go_on(address: str) -> None:
    body = {**LONG, "n": 8, "stream": True, "logprobs": 20}
    content = json.dumps(body).encode()
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.socket() as talk:
        talk.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        talk.connect((host, int(port)))
        talk.sendall(head(len(content)) + content)
        assert httpx.post(f"{address}/v1/completions", json=ASK, timeout=20).status_code == 200
        idle(address)
        numbers = httpx.get(f"{address}/metrics").text
        assert 'plait_answers_total{finish_reason="cancelled"} 8.0' in numbers
    works(address)


def test_nonsense_on_the_socket_is_answered_or_closed(address: str) -> None:
    for nonsense in (
        b"\x00" * 64,
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ):
        with connect(address) as talk:
            talk.sendall(nonsense)
            answer = talk.recv(4096)
            assert answer == b"" or b" 400 " in answer.split(b"\r\n")[0] or b" 4" in answer.split(b"\r\n")[0]
    works(address)


def test_a_port_in_use_is_one_sentence() -> None:
    with bind(Settings(port=0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Port {port} of 127.0.0.1 is in use"):
            bind(Settings(port=port))


def test_the_end_waits_for_what_was_begun(make_small: Callable[..., LanguageModel]) -> None:
    async def talk(url: str) -> tuple[int, int]:
        async with httpx.AsyncClient(timeout=30) as client:
            asked = asyncio.ensure_future(client.post(f"{url}/v1/completions", json=LONG))
            while (await client.get(f"{url}/v1/status")).json()["engine"]["running"] == 0:
                await asyncio.sleep(0.01)
            begun.set()
            answer = await asked
            return answer.status_code, answer.json()["usage"]["completion_tokens"]

    import threading

    begun = threading.Event()
    result: list[tuple[int, int]] = []
    with live_server(make_small()) as url:
        thread = threading.Thread(target=lambda: result.append(asyncio.run(talk(url))))
        thread.start()
        assert begun.wait(20)
    thread.join(timeout=30)
    assert result == [(200, 450)]


@pytest.mark.model
def test_the_model_file_may_be_removed_while_the_server_runs(smollm2_gguf: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(smollm2_gguf.read_bytes())
    with live_server(load(copy)) as url:
        body = {"model": "copy.gguf", "prompt": "The capital of France is", "max_tokens": 3, "temperature": 0}
        before = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"]
        copy.unlink()
        after = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"]
        assert before == after
        assert "Paris" in before[0]["text"]


def test_errors_of_ours_that_are_the_servers_fault_are_500() -> None:
    from plait.serve.errors import error_of

    assert error_of(PlaitError("broken")).status == 500
    assert error_of(ConfigError("wrong")).status == 400
