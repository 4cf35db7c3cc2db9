"""How does the server bear load, and what does HTTP cost beside the engine alone?

    python bench/serve_load.py soak                       64 clients for 3 minutes, with random cancels
    python bench/serve_load.py soak --seconds 20 --clients 16
    python bench/serve_load.py overhead --rounds 3        tokens/s of the server over those of the engine
    python bench/serve_load.py contest --rounds 3         against llama_cpp.server and vLLM's server

All is on the loopback interface, and bounded in time. Results are JSON in build/bench. `soak` fails on an error, on a
stall above 10 s, and where memory, less what is kept of prompts within its budget, does not return within 5 %;
`overhead` fails below 90 %. `contest` needs `python bench/peers.py install`; servers take turns, and those that do
not have it are stopped meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import peers
import texts
from contest import RESULTS
from http_streams import Answer, Server, plait_server, stream
from plait.claims.machine import Machine
from plait.files import write_text

STALL_SECONDS = 10.0
RETURN_SHARE = 0.05
ENGINE_SHARE = 0.9
# Room for 64 sequences and for what a warm server keeps; small enough that a short run fills it.
KEPT_BYTES = 512 * 2**20


def prompts(count: int, seed: int, *, shared: int = 0) -> list[str]:
    """Passages of about 20 to 120 words; half of them begin with the same `shared` words."""
    words = texts.words()
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        start = chance.randrange(len(words) - 200)
        own = words[start : start + chance.randrange(20, 120)]
        made.append(" ".join([*words[: shared * chance.randrange(2)], *own]))
    return made


# ---- soak


async def load(port: int, clients: int, seconds: float, seed: int) -> list[tuple[Answer, bool]]:
    """Keep clients asking; each answer, and whether its client meant to leave early."""
    deadline = time.monotonic() + seconds
    answers: list[tuple[Answer, bool]] = []

    async def one(number: int) -> None:
        chance = random.Random(seed * 1000 + number)
        own = prompts(40, seed * 1000 + number, shared=60)
        while time.monotonic() < deadline:
            body = {
                "model": "smollm2",
                "prompt": chance.choice(own),
                "max_tokens": chance.randrange(16, 96),
                "temperature": 0.8,
                "seed": chance.randrange(10**6),
                "ignore_end": True,
            }
            leave = chance.randrange(1, 30) if chance.random() < 0.25 else None
            answers.append(
                (await stream(port, "/v1/completions", body, leave_after=leave), leave is not None)
            )

    await asyncio.gather(*(one(number) for number in range(clients)))
    return answers


def settled(server: Server) -> dict[str, Any]:
    """The server's numbers once nothing runs any more."""
    deadline = time.monotonic() + 60
    while True:
        now = server.get("/v1/status")
        engine = now["engine"]
        if engine["running"] + engine["waiting"] == 0:
            own = engine["memory_bytes"] - engine["prefix_bytes"]
            return {"process": now["process_bytes"], "kept": engine["prefix_bytes"], "unfinished": own}
        if time.monotonic() > deadline:
            raise SystemExit(f"error: the server does not come to rest: {engine}")
        time.sleep(0.2)


def soak(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Errors, the longest stall, and what memory is left over."""
    flags = ("--memory-bytes", str(KEPT_BYTES), "--max-requests-per-key", str(4 * options.clients))
    with plait_server(*flags, threads=options.threads) as server:
        warm = max(10.0, options.seconds / 6)
        asyncio.run(load(server.port, options.clients, warm, seed=1))
        before = settled(server)
        begun = time.monotonic()
        answers = asyncio.run(load(server.port, options.clients, options.seconds, seed=2))
        seconds = time.monotonic() - begun
        after = settled(server)
    errors = [one.error for one, _ in answers if one.error is not None]
    grown = (after["process"] - after["kept"]) / (before["process"] - before["kept"]) - 1
    longest = max(one.longest for one, _ in answers)
    found = {
        "clients": options.clients,
        "seconds": round(seconds, 1),
        "answers": len(answers),
        "left_early": sum(left for _, left in answers),
        "tokens_per_second": round(sum(one.tokens for one, _ in answers) / seconds, 1),
        "errors": len(errors),
        "first_errors": errors[:3],
        "longest_stall_seconds": round(longest, 2),
        "median_first_token_seconds": round(statistics.median(one.first for one, _ in answers), 3),
        "memory_before": before,
        "memory_after": after,
        "memory_grown_share": round(grown, 4),
    }
    holds = (
        not errors and longest <= STALL_SECONDS and abs(grown) <= RETURN_SHARE and after["unfinished"] == 0
    )
    return found, holds


# ---- the server beside the engine alone


def requests(count: int, tokens: int) -> list[dict[str, Any]]:
    """The same requests for the server and for the engine."""
    return [
        {"prompt": prompt, "max_tokens": tokens, "temperature": 0.8, "seed": seed, "ignore_end": True}
        for seed, prompt in enumerate(prompts(count, seed=3))
    ]


async def rate(port: int, bodies: list[dict[str, Any]], clients: int) -> float:
    """Tokens a second of some clients that share a list of requests."""
    left = list(reversed(bodies))
    tokens = 0

    async def one() -> None:
        nonlocal tokens
        while left:
            answer = await stream(port, "/v1/completions", left.pop(), patience=300)
            if answer.error is not None:
                raise SystemExit(f"error: {answer.error}")
            tokens += answer.tokens

    begun = time.monotonic()
    await asyncio.gather(*(one() for _ in range(clients)))
    return tokens / (time.monotonic() - begun)


def engine_rate(options: argparse.Namespace) -> float:
    """Tokens a second of the engine alone, with as many requests under way as the server has clients."""
    import plait
    from plait.serve import Settings

    settings = Settings()
    lm = plait.load("smollm2")
    left = [
        lm.request(
            lm.encode(body["prompt"]),
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
            seed=body["seed"],
            ignore_end=True,
        )
        for body in reversed(requests(options.requests, options.tokens))
    ]
    engine = lm.new_engine(
        memory_bytes=settings.memory_bytes,
        rows_per_step=settings.rows_per_step,
        max_sequences=settings.max_sequences,
    )
    running = set()
    tokens = 0
    begun = time.monotonic()
    while left or running:
        while left and len(running) < options.clients:
            running.add(engine.submit(left.pop()))
        for sequence, piece in engine.step():
            if piece.finish_reason is not None:
                running.discard(sequence)
                tokens += len(sequence.result().tokens)
    return tokens / (time.monotonic() - begun)


def overhead(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Medians of both, in turns. Each round has a fresh server, since one that has seen the prompts keeps them."""
    rates: dict[str, list[float]] = {"server": [], "engine": []}
    command = [sys.executable, __file__, "engine", "--clients", str(options.clients)]
    command += ["--requests", str(options.requests), "--tokens", str(options.tokens)]
    bodies = [{"model": "smollm2", **body} for body in requests(options.requests, options.tokens)]
    for body in bodies:
        body["stream_options"] = {"include_usage": True}
    for _ in range(options.rounds):
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        rates["engine"].append(float(ran.stdout))
        with plait_server("--max-requests-per-key", "256", threads=options.threads) as server:
            rates["server"].append(asyncio.run(rate(server.port, bodies, options.clients)))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    share = medians["server"] / medians["engine"]
    found = {"clients": options.clients, "tokens_per_second": rates, "medians": medians, "share": share}
    return found, share >= ENGINE_SHARE


# ---- against other servers


def contestants(threads: int) -> dict[str, Callable[[], Server]]:
    """How each server is started; all hold SmolLM2-135M-Instruct, vLLM the same weights in fp32."""
    count = str(threads)
    environment = {"OMP_NUM_THREADS": count, "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"}
    found: dict[str, Callable[[], Server]] = {
        "plait": lambda: plait_server("--max-requests-per-key", "256", threads=threads)
    }
    llama, vllm = peers.PEERS["llama.cpp"], peers.PEERS["vllm"]
    if llama.is_installed:
        command = [str(llama.python), "-m", "llama_cpp.server", "--model", peers.gguf(), "--port", "{port}"]
        command += ["--n_ctx", "4096", "--n_threads", count, "--n_threads_batch", count]
        command += ["--interrupt_requests", "false", "--verbose", "false", "--model_alias", "smollm2"]
        found["llama_cpp.server"] = lambda: Server("llama_cpp.server", command)
    if vllm.is_installed:
        # The command of its wheel for processors looks for a package of another name.
        serve = [str(vllm.python), "-m", "vllm.entrypoints.openai.api_server", "--model", peers.folder()]
        serve += ["--dtype", "float32"]
        serve += ["--host", "127.0.0.1", "--port", "{port}", "--served-model-name", "smollm2"]
        serve += ["--max-model-len", "4096", "--max-num-seqs", "64", "--enforce-eager"]
        found["vllm"] = lambda: Server("vllm", serve, environment=environment, seconds=600)
    return found


def body_for(name: str, prompt: str, tokens: int) -> dict[str, Any]:
    """A greedy request that goes on to its last token, in each server's words."""
    body: dict[str, Any] = {"model": "smollm2", "prompt": prompt, "max_tokens": tokens, "temperature": 0.0}
    if name == "llama_cpp.server":
        # It has no word for that, so its two tokens that end a text are ruled out.
        return {**body, "logit_bias": {"0": -100, "2": -100}}
    word = "ignore_end" if name == "plait" else "ignore_eos"
    return {**body, word: True, "stream_options": {"include_usage": True}}


async def first_token(server: Server, number: int) -> float:
    """Seconds to the first token behind a system prompt of about 1,000 tokens that was read before."""
    system = " ".join(texts.words()[5000:5640])
    body = body_for(server.name, f"{system}\n\nQuestion {number}: what is said above? Answer:", 2)
    answer = await stream(server.port, "/v1/completions", body, patience=300)
    if answer.error is not None:
        raise SystemExit(f"error: {server.name}: {answer.error}")
    return answer.first


def contest(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Tokens a second at each concurrency, and seconds to the first token, of all servers in turns."""
    levels = [int(level) for level in options.levels.split(",")]
    samples: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        servers = []
        for start in contestants(options.threads).values():
            server = stack.enter_context(start())
            answer = asyncio.run(
                stream(server.port, "/v1/completions", body_for(server.name, "The capital of France is", 8))
            )
            if "Paris" not in answer.text:
                raise SystemExit(f"error: {server.name} computes something else: {answer}")
            asyncio.run(first_token(server, 0))
            server.freeze()
            servers.append(server)
        for number in range(options.rounds):
            for server in servers[:: 1 if number % 2 else -1]:
                server.thaw()
                found = samples.setdefault(server.name, {})
                for level in levels:
                    # New prompts each round, so that nothing was read before.
                    asked = prompts(max(4, level), seed=100 * number + level)
                    bodies = [body_for(server.name, prompt, options.tokens) for prompt in asked]
                    speed = asyncio.run(rate(server.port, bodies, level))
                    found.setdefault(f"tokens/s at {level}", []).append(speed)
                asyncio.run(first_token(server, 0))
                for turn in range(3):
                    seconds = asyncio.run(first_token(server, 10 * number + turn + 1))
                    found.setdefault("first token s", []).append(seconds)
                server.freeze()
        for server in servers:
            server.thaw()
    medians = {
        name: {what: statistics.median(values) for what, values in found.items()}
        for name, found in samples.items()
    }
    ahead = all(
        (ours < theirs[what]) == what.endswith(" s")
        for what, ours in medians["plait"].items()
        for name, theirs in medians.items()
        if name != "plait"
    )
    return {"samples": samples, "medians": medians}, ahead


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["soak", "overhead", "contest", "engine"])
    parser.add_argument("--seconds", type=float, default=180.0, help="of the soak")
    parser.add_argument("--clients", type=int, default=64, help="of the soak and the overhead")
    parser.add_argument("--requests", type=int, default=192, help="of a round of the overhead")
    parser.add_argument("--levels", default="1,8,32", help="concurrencies of the contest")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.what == "engine":
        print(engine_rate(options))
        return 0
    found, holds = {"soak": soak, "overhead": overhead, "contest": contest}[options.what](options)
    text = json.dumps({"machine": str(Machine.this()), "holds": holds, **found}, indent=1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_text(RESULTS / f"serve-{options.what}.json", text + "\n")
    print(text)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
