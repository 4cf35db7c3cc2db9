"""Several replicas: each request goes to one, one that dies takes nothing else with it, and none is left over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest

from plait.serve import Settings
from plait.serve.errors import HTTPError
from plait.serve.front import Front, Target
from plait.serve.sharing import sequences


@pytest.fixture
def served(smollm2_gguf: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of two replicas, and the front's process."""
    command = [sys.executable, "-c", "from plait.cli import main; main()", "serve", "--replicas", "2"]
    command += ["--port", "0", "--model", str(smollm2_gguf)]
    command += ["--max-requests-per-key", "2", "--max-sessions-per-key", "2"]
    front = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert front.stderr is not None
    try:
        for line in front.stderr:
            if found := re.search(r"Listening on (http://\S+)\.", line):
                break
        else:
            raise AssertionError("the front did not start")
        yield found[1], front
    finally:
        front.kill()
        front.wait()
        front.stderr.close()


async def read(client: httpx.AsyncClient, url: str, begun: asyncio.Event) -> list[str]:
    ask = {"model": "SmolLM2-135M-Instruct-Q4_1.gguf", "prompt": "Once", "max_tokens": 120, "stream": True}
    lines = []
    ask["model"] = (await client.get(f"{url}/v1/models")).json()["data"][0]["id"]
    async with client.stream("POST", f"{url}/v1/completions", json={**ask, "ignore_end": True}) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line:
                begun.set()
                lines.append(line.removeprefix("data: "))
    return lines


@pytest.mark.model
def test_a_killed_replica_tells_its_client_and_the_others_go_on(
    served: tuple[str, subprocess.Popen[str]],
) -> None:
    url, front = served
    children = psutil.Process(front.pid).children()
    replicas = [child for child in children if "plait.serve.replica" in child.cmdline()]
    assert len(replicas) == 2

    async def main() -> None:
        async with httpx.AsyncClient(timeout=120) as client:
            session = (await client.post(f"{url}/v1/sessions", json={"text": "Hello"})).json()["id"]
            assert re.match(r"s[01]-", session)
            assert (await client.get(f"{url}/v1/sessions/{session}")).json()["text"] == "Hello"
            begun = [asyncio.Event() for _ in range(2)]
            streams = [asyncio.ensure_future(read(client, url, begun[0]))]
            await begun[0].wait()
            # The other replica has less to do, so this session opens there; both are the key's.
            other = (await client.post(f"{url}/v1/sessions", json={})).json()["id"]
            assert {session[:2], other[:2]} == {"s0", "s1"}
            listed = (await client.get(f"{url}/v1/sessions")).json()["data"]
            assert {one["id"] for one in listed} == {session, other}
            for path, body in ((f"/v1/sessions/{other}/fork", {}), ("/v1/sessions", {})):
                assert (await client.post(url + path, json=body)).status_code == 429
            streams.append(asyncio.ensure_future(read(client, url, begun[1])))
            await begun[1].wait()
            model = (await client.get(f"{url}/v1/models")).json()["data"][0]["id"]
            over = await client.post(f"{url}/v1/completions", json={"model": model, "prompt": "Once"})
            assert over.status_code == 429
            assert int(over.headers["retry-after"]) >= 1
            replicas[0].kill()
            answers = await asyncio.gather(*streams)
            ends = sorted(answer[-1] == "[DONE]" for answer in answers)
            assert ends == [False, True]
            lost = next(answer for answer in answers if answer[-1] != "[DONE]")
            assert "ended before the answer was complete" in json.loads(lost[-1])["error"]["message"]
            assert (await client.get(f"{url}/health")).status_code == 200

    asyncio.run(main())
    left = psutil.Process(front.pid).children()
    front.send_signal(signal.SIGTERM)
    assert front.wait(timeout=60) == 0
    psutil.wait_procs(left, timeout=30)
    assert not [child for child in (*left, *replicas) if child.is_running() and child.status() != "zombie"]


@pytest.mark.model
def test_a_replica_ends_with_its_front(smollm2_gguf: Path) -> None:
    settings = Settings(port=0, model=str(smollm2_gguf))
    command = [sys.executable, "-m", "plait.serve.replica", "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as replica:
        assert replica.stdin is not None
        assert replica.stdout is not None
        replica.stdin.write(settings.model_dump_json() + "\n")
        replica.stdin.flush()
        assert re.fullmatch(r"ready \d+\n", replica.stdout.readline())
        # This is what its operating system does for a front that is killed.
        replica.stdin.close()
        assert replica.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ("path", "body", "count"),
    [
        ("/v1/completions", {"prompt": "x"}, 1),
        ("/v1/completions", {"prompt": ["x", "y"], "n": 3}, 6),
        ("/v1/completions", {"prompt": [[1], [2], [3]], "n": 1, "best_of": 4}, 12),
        ("/v1/completions", {"prompt": [1, 2, 3], "n": None}, 1),
        ("/v1/completions", {"prompt": "x", "n": 1000}, 1),
        ("/v1/chat/completions", {"n": 5}, 5),
        ("/v1/sessions/s0-a/generate", {}, 1),
        ("/v1/completions", [], 1),
        ("/v1/sessions/s0-a/read", {"n": 3}, 0),
        ("/v1/bytes", {}, 0),
    ],
)
def test_the_front_counts_sequences_as_a_replica_does(path: str, body: object, count: int) -> None:
    assert sequences("POST", path, json.dumps(body).encode(), Settings()) == count
    assert sequences("GET", path, b"", Settings()) == 0


def test_requests_go_to_the_replica_with_the_fewest_and_sessions_to_theirs() -> None:
    front = Front(Settings(replicas=3))
    for replica in front.replicas:
        replica.target = Target("127.0.0.1", 1)
    front.replicas[0].running, front.replicas[1].running = 2, 1
    assert front._choose("/v1/completions").number == 2
    assert front._choose("/v1/sessions/s0-abc/read").number == 0
    with pytest.raises(HTTPError) as caught:
        front._choose("/v1/sessions/s7-abc")
    assert caught.value.status == 404
    front.replicas[0].target = None
    with pytest.raises(HTTPError) as caught:
        front._choose("/v1/sessions/s0-abc/read")
    assert (caught.value.status, caught.value.retry_after) == (503, 5)
    with contextlib.suppress(HTTPError):
        front._choose("/v1/sessions/s99999999999999999999-x")
