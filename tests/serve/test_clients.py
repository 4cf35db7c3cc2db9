"""Clients that others wrote: the official `openai` package, and schemathesis over the OpenAPI document."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from live import live_server

sys.path.insert(0, str(Path(__file__).parents[1] / "text"))
from tiny_wordnet import write_wordnet

from plait.engine import LanguageModel, load
from plait.serve import Settings
from plait.serve import service as service_module
from plait.text.wordnet import WordNet
from plait.text.words import Lexicon

KEY = "a-key-for-the-openai-client"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
# A longer run, as before a release, is `make fuzz`.
FUZZ_SECONDS = float(os.environ.get("PLAIT_FUZZ_SECONDS", "0"))
EXAMPLES = 20 if FUZZ_SECONDS else 3


@pytest.fixture(scope="module")
def client(smollm2_gguf: Path) -> Iterator[openai.OpenAI]:
    lm = load(smollm2_gguf)
    lm.name = "smollm2"
    with (
        live_server(lm, Settings(port=0, api_keys=(KEY,), max_requests_per_key=4)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120) as opened,
    ):
        yield opened


@pytest.mark.model
def test_openai_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2"]
    answer = client.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    stream = client.chat.completions.create(
        model="smollm2", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == answer.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
    # What a client got, it may send back.
    again: Any = [*QUESTION, answer.choices[0].message.model_dump(), {"role": "user", "content": "Of Italy?"}]
    assert client.chat.completions.create(
        model="smollm2", messages=again, temperature=0, max_tokens=20
    ).choices


@pytest.mark.model
def test_openai_n_stop_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smollm2",
        messages=QUESTION,
        n=3,
        seed=7,
        max_completion_tokens=12,
        logprobs=True,
        top_logprobs=4,
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert all(len(entry.top_logprobs) == 4 for entry in choice.logprobs.content)
    stopped = client.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0, stop=[" is"])
    assert stopped.choices[0].message.content == "The capital of France"
    completion = client.completions.create(
        model="smollm2",
        prompt="The capital of France is",
        max_tokens=2,
        temperature=0,
        logprobs=2,
        echo=False,
    )
    assert completion.choices[0].text == " Paris."
    assert completion.choices[0].logprobs is not None
    assert completion.choices[0].logprobs.tokens == [" Paris", "."]


@pytest.mark.model
def test_openai_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="smollm2",
        messages=QUESTION,
        seed=1,
        max_tokens=80,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": schema, "strict": True},
        },
    )
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schema)


@pytest.mark.model
def test_openai_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(model="smollm2", messages=QUESTION, tools=[])
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="smollm2", prompt="x " * 9000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="smollm2", messages=QUESTION, n=5)
    with pytest.raises(openai.BadRequestError, match="no encoder is loaded"):
        client.embeddings.create(model="smollm2", input="x")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


# Whether a prompt or a JSON schema is accepted depends on the model, which no OpenAPI document can say.
LEFT_OUT = [schemathesis.checks.positive_data_acceptance]
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)


def test_schemathesis_finds_nothing(
    make_small: Callable[..., LanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lexicon = Lexicon(WordNet(write_wordnet(tmp_path / "dict")))
    monkeypatch.setattr(service_module, "_read_lexicon", lambda _: lexicon)
    limits = settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=not FUZZ_SECONDS,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    count = rounds = 0
    begun = time.monotonic()
    served = Settings(port=0, max_new_tokens=8, max_sessions_per_key=10_000, watermark=True)
    with live_server(make_small(), served) as url:
        document = schemathesis.openapi.from_url(f"{url}/openapi.json")
        while not rounds or time.monotonic() < begun + FUZZ_SECONDS:
            rounds += 1
            for found in document.get_all_operations():
                operation = found.ok()
                for mode in MODES if operation.body else MODES[:1]:

                    @seed(rounds)
                    @limits
                    @given(case=operation.as_strategy(generation_mode=mode))
                    def run(case: schemathesis.Case) -> None:
                        nonlocal count
                        count += 1
                        case.call_and_validate(excluded_checks=LEFT_OUT, timeout=120)

                    run()
    assert count >= 20 * EXAMPLES
    sys.stdout.write(f"{count} requests in {rounds} rounds\n")
