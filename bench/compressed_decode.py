"""Does a token cost more when the past is stored in few bits, or seen in parts?

SmolLM2-135M-Instruct (4-bit weights, one native call a token) decodes behind a past of Python's manual, which is read
once and stored in every memory. The memories take turns; numbers are medians over rounds. Before anything is timed,
each memory's native attention is compared with the torch form of what it stores; no speed is printed where they differ.
`native` is the share of tokens that the one native call answered.

    python bench/compressed_decode.py
    python bench/compressed_decode.py --tokens 2000 --rounds 3 --only dense,gear:bits=4 --json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from plait import LanguageModel, load
from plait.claims.machine import memory_bandwidth
from plait.claims.texts import token_runs
from plait.memory import FrozenStrand, MemoryPlan, Past, Rows
from plait.nn.transformer import Program
from plait.ops import Everything, native

MEMORIES = [
    "dense",
    "dense:dtype=bf16",
    "dense:dtype=fp16",
    "gear:bits=4",
    "gear:bits=4,backbone=kcvt",
    "gear:bits=2",
    "saq",
    "saq:steps=64@16/rest@4",
    "think:ratio=0.4",
    "think:ratio=0.4,gear:bits=4",
    "window:size=1024",
    "lm-infinite",
    "lm-infinite:style=streaming",
    "infllm:local=512,initial=64,block=64,topk=10",
    "infllm:local=512,initial=64,block=64,topk=10,gear:bits=4",
    "infllm:local=512,initial=64,block=64,topk=10,cold=file",
    "infllm:local=512,initial=64,block=64,topk=10,cold=file,gear:bits=4",
    "prflash",
    "prflash:mode=bernoulli,correct=true",
]
# Last tokens of the past that the model itself reads, so that codecs see queries.
READ = 64
# Codes become numbers by one rounding less natively, and sums run in another order.
TOLERANCE = 1e-4


def exact_past(
    lm: LanguageModel, ids: list[int], stored: Path | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values (T, G, D) of each layer."""
    if stored is not None and stored.exists():
        tensors = load_file(stored)
        return [(tensors[f"{i}.keys"], tensors[f"{i}.values"]) for i in range(len(tensors) // 2)]
    past = lm.model.new_past(MemoryPlan())
    lm.new_engine(rows_per_step=512).read(ids, past)
    tails = [[*memory.strands, memory.tail] for memory in past.memories("copied")]
    layers = []
    for strands in tails:
        plain = [strand for strand in strands if isinstance(strand, FrozenStrand)]
        keys, values = (torch.cat([getattr(s, name) for s in plain], dim=1) for name in ("keys", "values"))
        layers.append((keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous()))
    if stored is not None:
        named = [
            (f"{i}.{name}", t)
            for i, pair in enumerate(layers)
            for name, t in zip(("keys", "values"), pair, strict=True)
        ]
        save_file(dict(named), stored)
    return layers


def filled(
    lm: LanguageModel, memory: str, layers: list[tuple[torch.Tensor, torch.Tensor]], ids: list[int]
) -> Past:
    past = lm.model.new_past(MemoryPlan.parse(memory))
    written = len(ids) - READ
    for layer, (keys, values) in zip(past.memories("filled"), layers, strict=True):
        layer.append(keys[:written], values[:written])
        layer.commit(is_prompt=True)
    with torch.inference_mode():
        rows = Rows([(READ, written)])
        lm.model.answer(torch.tensor(ids[written:]), rows, [past], wanted=torch.tensor([READ - 1]))
        past.commit()
    return past


class Counted:
    """A program that counts the passes that it answers and those that it leaves to the modules."""

    def __init__(self, program: Program) -> None:
        self.program, self.answered, self.left = program, 0, 0

    def __call__(self, *arguments: Any, **settings: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        found = self.program(*arguments, **settings)
        self.answered += found is not None
        self.left += found is None
        return found

    def share(self) -> float:
        """Of the passes since it was last asked, those that it answered."""
        answered, total = self.answered, self.answered + self.left
        self.answered = self.left = 0
        return answered / max(total, 1)


def error(past: Past) -> float:
    """Largest difference of native attention from the torch form, over the coded strands of a few layers."""
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for memory in past.memories("compared")[::10]:
        heads = memory.heads
        q = torch.randn(3, heads.num_heads, heads.head_dim, generator=generator)
        for strand in memory.strands:
            if strand.native_form() is None:
                continue
            found = strand.attend(q, len(memory), Everything())
            twin = strand.copied()
            for part in (twin, getattr(twin, "inner", twin)):
                if not isinstance(part, FrozenStrand):
                    part._native = None
            wanted = twin.attend(q, len(memory), Everything())
            worst = max(worst, float((found.out - wanted.out).abs().max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=8, help="tokens of one turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="memories, separated by ';'")
    parser.add_argument(
        "--prompt-file", type=Path, help="where keys and values of the past are kept between runs"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if native.module() is None:
        raise SystemExit("This measures the native operations; unset PLAIT_NATIVE.")
    torch.set_num_threads(native.extension().threads())
    lm = load("smollm2")
    assert lm.model.program is not None
    lm.model.program = counted = Counted(lm.model.program)
    (ids,) = token_runs(lm.tokenizer, [options.tokens])
    layers = exact_past(lm, ids, options.prompt_file)
    names = options.only.split(";") if options.only else MEMORIES
    pasts = {name: filled(lm, name, layers, ids) for name in names}
    errors = {name: error(past) for name, past in pasts.items()}
    for name, off in errors.items():
        if off > TOLERANCE:
            raise SystemExit(f"{name}: native attention is off by {off:.2g}; no speed is reported")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    shares: dict[str, float] = {}
    counted.share()
    with torch.inference_mode():
        for number in range(options.rounds + 1):
            for name in names[:: 1 if number % 2 else -1]:
                past = pasts[name]
                start = time.perf_counter()
                for token in range(options.steps):
                    rows = Rows([(1, len(past))])
                    lm.model.answer(torch.tensor([token + 100]), rows, [past], wanted=torch.tensor([0]))
                    past.commit()
                if number:
                    seconds[name].append((time.perf_counter() - start) / options.steps)
                shares[name] = counted.share()
                past.truncate(options.tokens)
    rows = []
    for name in names:
        ratios = [dense / own for dense, own in zip(seconds[names[0]], seconds[name], strict=True)]
        held = sum(memory.nbytes() for memory in pasts[name].memories("counted"))
        median = statistics.median(seconds[name])
        rows.append(
            {
                "memory": name,
                "ms_a_token": median * 1e3,
                "lowest_ms": min(seconds[name]) * 1e3,
                "speed_of_first": statistics.median(ratios),
                "native": shares[name],
                "held_mb": held / 1e6,
                "gb_s_of_past": held / median / 1e9,
                "off_by": errors[name],
            }
        )
    machine = {
        "tokens": options.tokens,
        "rounds": options.rounds,
        "threads": native.extension().threads(),
        "isa": native.extension().isa(),
        "processor": platform.processor() or platform.machine(),
        "memory_bandwidth_gb_s": memory_bandwidth() / 1e9,
    }
    if options.json:
        json.dump({"machine": machine, "rows": rows}, sys.stdout, indent=2)
        print()
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(
        f"{'memory':66} {'ms/token':>9} {'lowest':>8} {'speed':>6} {'native':>6} {'held MB':>8} {'off by':>8}"
    )
    for row in rows:
        print(
            f"{row['memory']:66} {row['ms_a_token']:9.2f} {row['lowest_ms']:8.2f} {row['speed_of_first']:6.2f} "
            f"{row['native']:6.2f} {row['held_mb']:8.1f} {row['off_by']:8.1e}"
        )


if __name__ == "__main__":
    main()
