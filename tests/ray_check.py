"""The server in Ray Serve, on this machine, asked by OpenAI's client and by LangChain's wrapper of it.

Run by `make ray-check`; not part of `make test`, since Ray and LangChain bring more packages than all else here.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

# Set before Ray is imported, which would tell its makers of its use.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# A machine that does other things too needs longer than Ray waits for its proxy.
os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "120"
os.environ["RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S"] = "120"

import openai
import ray
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI
from ray import serve

from plait.errors import ConfigError
from plait.serve.ray_deployment import app

KEY = "a-key-for-the-check-of-ray"
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."


def check_refusals() -> None:
    """Wrong settings are named before Ray does anything."""
    for args, word in (
        ({"port": 1}, "port"),
        ({"modle": "x"}, "modle"),
        ({"num_replicas": "none"}, "num_replicas"),
    ):
        try:
            app(args)
        except ConfigError as error:
            told = str(error)
        else:
            told = "nothing"
        assert word in told, f"{args} is refused with {told}"


def check_openai(url: str) -> None:
    """Whole and streamed answers, errors, and sessions that several replicas do not have."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)
    messages = [{"role": "user", "content": QUESTION}]
    for _ in range(4):
        answer = client.chat.completions.create(model="smollm2", messages=messages, temperature=0)
        assert answer.choices[0].message.content == ANSWER
    chunks = client.chat.completions.create(model="smollm2", messages=messages, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    for wrong, kind in (
        (
            lambda: client.chat.completions.create(model="smollm2", messages=messages, tools=[]),
            openai.BadRequestError,
        ),
        (lambda: client.with_options(api_key="wrong").models.list(), openai.AuthenticationError),
        (lambda: client.post("/sessions", body={}, cast_to=object), openai.RateLimitError),
    ):
        try:
            wrong()
        except kind:
            continue
        raise AssertionError(f"{kind.__name__} did not come")


def check_langchain(url: str) -> None:
    """LangChain's wrappers, which send what OpenAI's own server takes."""
    chat = ChatOpenAI(model="smollm2", base_url=f"{url}/v1", api_key=KEY, temperature=0, max_retries=0)
    answer = chat.invoke([HumanMessage(QUESTION)])
    assert answer.content == ANSWER
    assert answer.usage_metadata["output_tokens"] > 0
    assert "".join(str(piece.content) for piece in chat.stream(QUESTION)) == ANSWER
    assert [one.content for one in chat.batch([QUESTION] * 3)] == [ANSWER] * 3
    likely = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert likely.response_metadata["logprobs"]["content"][0]["top_logprobs"]
    schema = {
        "title": "City",
        "description": "A city.",
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    }
    city = chat.with_structured_output(schema, method="json_schema").invoke(QUESTION)
    assert set(city) == {"city"}
    plain = OpenAI(model="smollm2", base_url=f"{url}/v1", api_key=KEY, temperature=0, max_tokens=2)
    assert plain.invoke("The capital of France is") == " Paris."


def main() -> None:
    """Serve with two replicas, ask, and end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8123)
    given = parser.parse_args()
    check_refusals()
    begun = time.monotonic()
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": given.port})
        serve.run(app({"model": "smollm2", "num_replicas": 2, "api_keys": KEY}))
        url = f"http://127.0.0.1:{given.port}"
        check_openai(url)
        check_langchain(url)
    finally:
        serve.shutdown()
        ray.shutdown()
    sys.stdout.write(f"Ray Serve and LangChain are in order, in {time.monotonic() - begun:.0f} s.\n")


if __name__ == "__main__":
    main()
