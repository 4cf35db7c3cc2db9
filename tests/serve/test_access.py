"""Keys, hosts, origins, tenants and limits: who gets in, and how much."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from fastapi.routing import APIRoute

from plait.engine import LanguageModel
from plait.errors import ConfigError
from plait.serve import Settings, create_app, read_settings
from plait.serve.gate import json_depth

Serve = Callable[..., Any]
KEYS = ("anna-anna-anna-anna", "bert-bert-bert-bert")
ASK = {"model": "small", "prompt": "abc", "max_tokens": 2}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_every_route_but_health_and_the_page_needs_the_key(
    serve: Serve, make_small: Callable[..., LanguageModel]
) -> None:
    app = create_app(make_small(), Settings(api_keys=KEYS))
    paths = [
        (method, path)
        for path, operations in app.openapi()["paths"].items()
        for method in operations
        if path != "/health"
    ]
    assert len(paths) >= 20

    async def talk(client: httpx.AsyncClient) -> None:
        for method, path in [*paths, ("get", "/openapi.json"), ("get", "/nothing")]:
            for headers in ({}, bearer("wrong-wrong-wrong-wrong"), {"authorization": KEYS[0]}):
                answer = await client.request(method.upper(), path, headers=headers)
                assert answer.status_code == 401, (method, path)
                assert answer.json()["error"]["code"] == "invalid_api_key"
        for path in ("/health", "/"):
            assert (await client.get(path)).status_code == 200
        for headers in (bearer(KEYS[0]), bearer(KEYS[1]), {"x-api-key": KEYS[0]}):
            assert (await client.post("/v1/completions", json=ASK, headers=headers)).status_code == 200

    serve(talk, api_keys=KEYS)
    assert not [route for route in app.routes if isinstance(route, APIRoute) and "admin" in route.path]


def test_keys_are_kept_as_hashes_and_may_be_given_so(
    serve: Serve, make_small: Callable[..., LanguageModel]
) -> None:
    digest = "sha256:" + hashlib.sha256(KEYS[0].encode()).hexdigest()

    async def talk(client: httpx.AsyncClient) -> None:
        assert (await client.get("/v1/models", headers=bearer(KEYS[0]))).status_code == 200
        assert (await client.get("/v1/models", headers=bearer(digest))).status_code == 401

    serve(talk, api_keys=(digest,))
    service = create_app(make_small(), Settings(api_keys=KEYS)).state.service
    assert KEYS[0] not in repr(vars(service.keys))


def test_all_hashes_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.serve import keys

    compared = []
    original = keys.hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: compared.append(1) or original(a, b))
    assert keys.Keys(KEYS).tenant(bearer(KEYS[0])) is not None
    assert len(compared) == 2


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.com"])
def test_another_address_than_loopback_needs_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="needs an API key"):
        read_settings({"host": host}, {})
    assert read_settings({"host": host, "api_keys": KEYS[0]}, {}).host == host


def test_foreign_hosts_and_origins_are_turned_away(serve: Serve) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        async def status(**headers: str) -> int:
            return (await client.post("/v1/completions", json=ASK, headers=headers)).status_code

        assert await status() == 200
        # A web page whose name was pointed at this machine, and one that calls from elsewhere.
        assert await status(host="evil.example") == 403
        assert await status(origin="http://evil.example") == 403
        assert await status(origin="null") == 403
        assert await status(host="127.0.0.1", origin="http://127.0.0.1") == 200
        allowed = await client.post("/v1/completions", json=ASK, headers={"origin": "https://app.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
        assert (await client.options("/v1/completions", headers=asked)).status_code == 204
        asked["origin"] = "http://evil.example"
        refused = await client.options("/v1/completions", headers=asked)
        assert refused.status_code == 403
        assert "access-control-allow-origin" not in refused.headers

    serve(talk, allowed_origins=("https://app.example",))


@pytest.mark.parametrize("shares", [False, True])
def test_keys_share_no_strands_and_no_sessions(serve: Serve, shares: bool) -> None:
    ask = {"model": "small", "prompt": "x" * 200, "max_tokens": 2, "seed": 1}

    async def talk(client: httpx.AsyncClient) -> None:
        async def cached(key: str) -> int:
            body = (await client.post("/v1/completions", json=ask, headers=bearer(key))).json()
            return int(body["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert await cached(KEYS[0]) == 0
        assert await cached(KEYS[0]) == 192
        assert await cached(KEYS[1]) == (192 if shares else 0)
        new = await client.post("/v1/sessions", json={"text": "secret"}, headers=bearer(KEYS[0]))
        path = f"/v1/sessions/{new.json()['id']}"
        assert (await client.get(path, headers=bearer(KEYS[1]))).status_code == 404
        assert (await client.delete(path, headers=bearer(KEYS[1]))).status_code == 404
        assert (await client.get("/v1/sessions", headers=bearer(KEYS[1]))).json()["data"] == []
        assert (await client.get(path, headers=bearer(KEYS[0]))).json()["text"] == "secret"

    serve(talk, api_keys=KEYS, share_across_keys=shares)


def test_a_key_over_its_limit_waits_and_the_other_does_not(serve: Serve) -> None:
    long = {"model": "small", "prompt": "x", "max_tokens": 400, "ignore_end": True}

    async def talk(client: httpx.AsyncClient) -> None:
        async def post(body: dict[str, Any], key: str) -> httpx.Response:
            return await client.post("/v1/completions", json=body, headers=bearer(key))

        running = [asyncio.ensure_future(post(long, KEYS[0])) for _ in range(2)]
        while (await client.get("/v1/status", headers=bearer(KEYS[0]))).json()["engine"]["running"] < 2:
            await asyncio.sleep(0.01)
        refused = await post(ASK, KEYS[0])
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert (await post(ASK, KEYS[1])).status_code == 200
        assert (await post({**ASK, "n": 3}, KEYS[1])).status_code == 429
        assert [(await one).status_code for one in running] == [200, 200]
        assert (await post(ASK, KEYS[0])).status_code == 200

    serve(talk, api_keys=KEYS, max_requests_per_key=2)


@pytest.mark.parametrize(
    ("settings", "body", "status"),
    [
        ({"max_prompt_tokens": 4}, {**ASK, "prompt": "abcde"}, 400),
        ({"max_new_tokens": 4}, {**ASK, "max_tokens": 5}, 400),
        ({"max_choices": 2}, {**ASK, "n": 3}, 400),
        ({"max_stops": 1}, {**ASK, "stop": ["a", "b"]}, 400),
        ({"max_body_bytes": 1024}, {**ASK, "prompt": "x" * 1200}, 413),
        ({"max_json_depth": 4}, {**ASK, "prompt": [[[[[1]]]]]}, 400),
        ({"trace": False}, {**ASK, "trace": True, "stream": True}, 400),
        ({}, {**ASK, "prompt": "x" * 600}, 400),
        ({"memory_bytes": 4096}, {**ASK, "prompt": "x" * 400}, 400),
    ],
)
def test_limits_are_kept_and_named(
    serve: Serve, settings: dict[str, Any], body: dict[str, Any], status: int
) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == status, answer.text
        assert (
            any(digit in answer.json()["error"]["message"] for digit in "0123456789") or "trace" in settings
        )
        if status == 400 and settings not in ({}, {"memory_bytes": 4096}):
            assert (await client.post("/v1/completions", json=ASK)).status_code == 200

    serve(talk, **settings)


def test_the_log_has_no_prompt_unless_asked(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        body = {"model": "small", "prompt": "a secret", "max_tokens": 2, "user": "me\nforged line"}
        await client.post("/v1/completions", json=body)

    with caplog.at_level(logging.INFO, logger="plait.serve"):
        serve(talk)
        fields = [record.fields for record in caplog.records if record.getMessage() == "request"]  # type: ignore[attr-defined]
        assert (fields[-1]["status"], fields[-1]["prompt_tokens"], fields[-1]["new_tokens"]) == (200, 8, 2)
        assert "secret" not in repr(fields)
        serve(talk, log_prompts=True)
        assert "a secret" in repr(caplog.records[-1].fields)  # type: ignore[attr-defined]


@pytest.mark.parametrize("as_json", [True, False])
def test_a_client_cannot_write_a_line_of_the_log(as_json: bool) -> None:
    from plait.serve.logs import _Lines

    record = logging.makeLogRecord({"msg": "request", "levelname": "INFO", "fields": {"user": "x\nforged"}})
    assert "\n" not in _Lines(as_json).format(record)


def test_settings_have_one_name_in_flags_environment_and_file(tmp_path: Path) -> None:
    file = tmp_path / "plait.toml"
    file.write_text('port = 1\nmax_choices = 3\napi_keys = ["a-key-of-sixteen-x", "another-key-of-16"]\n')
    settings = read_settings(
        {"port": 3, "draft": None}, {"PLAIT_SERVE_PORT": "2", "PLAIT_DRAFT": "prompt-lookup"}, file
    )
    assert (settings.port, settings.draft, settings.max_choices) == (3, "prompt-lookup", 3)
    assert settings.api_keys == ("a-key-of-sixteen-x", "another-key-of-16")
    assert read_settings({}, {"PLAIT_SERVE_PORT": "2"}, file).port == 2
    assert read_settings({}, {"PLAIT_SERVE_API_KEYS": "a-key-of-sixteen-x, another-key-of-16"}).api_keys[
        1
    ] == ("another-key-of-16")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"port": 70000}, "port: "),
        ({"api_keys": "short"}, "at least 16 characters"),
        ({"api_keys": "sha256:xyz"}, "64 hexadecimal digits"),
        ({"log_format": "xml"}, "log_format"),
    ],
)
def test_a_wrong_setting_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_settings(given, {})
    assert "short" not in str(caught.value)


def test_a_file_with_an_unknown_name_or_damage_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "plait.toml"
    file.write_text("prot = 1\n")
    with pytest.raises(ConfigError, match="Did you mean 'port'"):
        read_settings({}, {}, file)
    file.write_text("port = \n")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_settings({}, {}, file)
    with pytest.raises(ConfigError, match="could not be read"):
        read_settings({}, {}, tmp_path / "nothing.toml")


@pytest.mark.parametrize(
    ("text", "depth"),
    [(b"1", 0), (b"[]", 1), (b'[{"a[[[": "]}\\"[["}]', 2), (b'{"a":[[1],[2]]}', 3), (b'["', 1)],
)
def test_depth_counts_brackets_outside_strings(text: bytes, depth: int) -> None:
    assert json_depth(text) == depth
