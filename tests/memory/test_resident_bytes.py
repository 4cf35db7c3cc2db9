"""What a memory says that it holds is what the process holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

TOKENS = 48_000
MEMORIES = [
    "dense",
    "dense:dtype=fp16",
    "gear:bits=4",
    "gear:bits=2,backbone=kcvt",
    "saq",
    "think:ratio=0.4,dense:dtype=bf16",
    "think:ratio=0.4,gear:bits=4",
    "snapkv:capacity=4096",
    "snapkv:capacity=4096,think:ratio=0.4",
    "window:size=4096",
    "infllm:local=2048,execution=2048,topk=4,cached=4,cold=file",
    "infllm:local=2048,execution=2048,topk=4,cached=4,cold=file,gear:bits=4",
]

# One process imports torch once; a child of it holds one memory, so that nothing of the others is left over.
SCRIPT = """
import ctypes, gc, json, os, sys
import psutil, torch
from plait.memory import Heads, Memory, MemoryPlan

torch.set_num_threads(1)
tokens, memories = int(sys.argv[1]), sys.argv[2:]
numbers = torch.randn(2, 2048, 3, 64, generator=torch.Generator().manual_seed(0))
query = torch.randn(2048, 3, 64, generator=torch.Generator().manual_seed(1))

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # Pages of a file are given back whenever somebody else needs the room.
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared

def held(spec):
    def fill(memory, length):
        while len(memory) < length:
            count = min(2048, length - len(memory))
            if len(memory) + count == length or memory.plan.policy.stores:
                memory.attend(query[:count], *numbers[:, :count])
            else:
                memory.append(*numbers[:, :count])
            memory.commit(is_prompt=len(memory) < length)
    with torch.inference_mode():
        # What is allocated once, whatever is held.
        fill(Memory(Heads(3, 3, 64, scale=0.125), MemoryPlan.parse(spec)), 4096)
        before = resident()
        memory = Memory(Heads(3, 3, 64, scale=0.125), MemoryPlan.parse(spec))
        fill(memory, tokens)
        return memory.nbytes(), resident() - before

for spec in memories:
    receive, send = os.pipe()
    if os.fork() == 0:
        os.write(send, json.dumps(held(spec)).encode())
        os._exit(0)
    os.close(send)
    os.wait()
    print(os.read(receive, 1000).decode(), flush=True)
"""


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[int, int]]:
    """Bytes that a memory counts and bytes by which the process grew, for each memory."""
    # Buffers that the matrix library keeps between products are not of a memory.
    environment = os.environ | {"MKL_DISABLE_FAST_MM": "1"}
    arguments = [sys.executable, "-c", SCRIPT, str(TOKENS), *MEMORIES]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout
    lines = [json.loads(line) for line in output.splitlines()]
    return {spec: (counted, grown) for spec, (counted, grown) in zip(MEMORIES, lines, strict=True)}


@pytest.mark.parametrize("spec", MEMORIES)
def test_counted_bytes_are_resident_and_no_others(measured: dict[str, tuple[int, int]], spec: str) -> None:
    counted, grown = measured[spec]
    # A page at the end of each tensor, small objects, and what the allocator keeps for later.
    slack = 6e6
    assert grown <= 1.05 * counted + slack
    assert grown >= 0.9 * counted - slack


@pytest.mark.parametrize(
    ("spec", "share"),
    [
        ("dense:dtype=fp16", 0.55),
        ("gear:bits=4", 0.25),
        ("gear:bits=2,backbone=kcvt", 0.2),
        ("saq", 0.2),
        ("think:ratio=0.4,dense:dtype=bf16", 0.45),
        ("think:ratio=0.4,gear:bits=4", 0.22),
        ("snapkv:capacity=4096", 0.15),
        ("snapkv:capacity=4096,think:ratio=0.4", 0.15),
        ("window:size=4096", 0.15),
        ("infllm:local=2048,execution=2048,topk=4,cached=4,cold=file", 0.25),
        ("infllm:local=2048,execution=2048,topk=4,cached=4,cold=file,gear:bits=4", 0.1),
    ],
)
def test_a_saving_is_seen_in_the_process(
    measured: dict[str, tuple[int, int]], spec: str, share: float
) -> None:
    assert measured[spec][1] <= share * measured["dense"][1]
