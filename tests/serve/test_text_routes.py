"""Laws of bytes, watermarks and conversations as tokens, over HTTP: what the library says, within limits."""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "text"))
from tiny_wordnet import write_wordnet

from plait.engine import LanguageModel
from plait.prose import Watermark
from plait.serve import service as service_module
from plait.text.wordnet import WordNet
from plait.text.words import Lexicon

Serve = Callable[..., Any]
SECRET = bytes(range(32))
KEY = base64.b64encode(SECRET).decode()
PROSE = (
    "A big dog often helps the kid, and an enormous car quickly starts. Large hounds begin to aid a child. "
    * 3
)


async def ask(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int = 200
) -> dict[str, Any]:
    answer = await client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return dict(answer.json())


def test_laws_of_bytes_are_those_of_the_library(
    serve: Serve, make_small: Callable[..., LanguageModel]
) -> None:
    own = make_small().bytes(start=[0])
    law, greedy = own.next("abc"), own.generate("abcde", max_bytes=5)

    async def talk(client: httpx.AsyncClient) -> None:
        body = {"prompt": "abc", "before": [0], "then": "de", "top": 257, "max_bytes": 5}
        told = await ask(client, "/v1/bytes", body)
        first = told["steps"][0]
        assert [step["byte"] for step in told["steps"]] == list(b"de")
        probabilities = {one["byte"]: one["probability"] for one in first["next"]}
        assert probabilities.pop(None) == pytest.approx(law[256])
        assert [probabilities[byte] for byte in range(256)] == pytest.approx(law[:256].tolist())
        assert first["probability"] == probabilities[ord("d")]
        assert np.diff([one["probability"] for one in told["next"]]).max() <= 0
        assert bytes(told["bytes"]) == greedy.data
        # Bytes that end inside a character are no text, and have a law all the same.
        cut = await ask(client, "/v1/bytes", {"prompt": [97, 0xE2], "before": [0], "top": 1})
        assert len(cut["next"]) == 1

    serve(talk)


def test_what_asks_for_too_many_bytes_or_no_text_is_refused(serve: Serve) -> None:
    good = {"prompt": "abc", "before": [0]}

    async def talk(client: httpx.AsyncClient) -> None:
        for wrong in (
            {"prompt": "x" * 51},
            {"prompt": [0xFF]},
            {"prompt": [256]},
            {"then": [0xFF]},
            {"then": "x" * 65},
            {"before": [999]},
            {"before": [1] * 60},
            {"before": []},
            {"top": 258},
            {"max_bytes": 65},
            {"prompt": "x", "before": None},
        ):
            error = (await ask(client, "/v1/bytes", {**good, **wrong}, 400))["error"]
            assert error["message"], wrong
        await ask(client, "/v1/bytes", good)

    serve(talk, max_text_chars=50, max_prompt_tokens=50)


def test_a_marked_text_is_found_by_its_key(
    serve: Serve, make_small: Callable[..., LanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lexicon = Lexicon(WordNet(write_wordnet(tmp_path / "dict")))
    monkeypatch.setattr(service_module, "_read_lexicon", lambda _: lexicon)
    own = Watermark(SECRET, lexicon, make_small(), max_replaced=1.0)
    wanted = own.embed(PROSE)
    assert wanted.replaced

    async def talk(client: httpx.AsyncClient) -> None:
        marked = await ask(client, "/v1/watermark/mark", {"text": PROSE, "key": KEY, "max_replaced": 1.0})
        assert marked["text"] == wanted.text
        assert marked["replaced"] == [one._asdict() for one in wanted.replaced]
        for precise in (False, True):
            found = await ask(
                client, "/v1/watermark/check", {"text": wanted.text, "key": KEY, "precise": precise}
            )
            assert found["ones"] == own.detect(wanted.text, mode="precise" if precise else "fast").ones
        other = Watermark(SECRET[::-1], lexicon).detect(wanted.text)
        body = {"text": wanted.text, "key": base64.b64encode(SECRET[::-1]).decode()}
        assert (await ask(client, "/v1/watermark/check", body))["ones"] == other.ones
        for wrong in ({"key": "!" * 24}, {"key": "A" * 25}, {"text": "x" * 8193}, {"alpha": 1}):
            refused = await ask(client, "/v1/watermark/check", {"text": PROSE, "key": KEY, **wrong}, 400)
            assert KEY not in str(refused)

    serve(talk, watermark=True)


def test_a_server_without_words_says_how_to_get_them(serve: Serve) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        for path in ("/v1/watermark/mark", "/v1/watermark/check"):
            error = (await ask(client, path, {"text": "a big dog", "key": KEY}, 400))["error"]
            assert "--watermark" in error["message"]

    serve(talk)


def test_a_conversation_is_tokenized_as_chat_does(serve: Serve) -> None:
    messages = [{"role": "user", "content": "abc"}]

    async def talk(client: httpx.AsyncClient) -> None:
        told = await ask(client, "/tokenize", {"messages": messages})
        asked = {"model": "small", "messages": messages, "max_tokens": 1}
        answer = await ask(client, "/v1/chat/completions", asked)
        assert told["count"] == answer["usage"]["prompt_tokens"] > 3
        await ask(client, "/tokenize", {}, 400)
        await ask(client, "/tokenize", {"text": "a", "messages": messages}, 400)

    serve(talk)
