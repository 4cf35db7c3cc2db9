"""What is lost at equal bytes: Plait's memories beside kvpress and Transformers' quantised cache.

SmolLM2-135M-Instruct in fp32 on both sides, the same windows of Python's manual: a prompt is read exactly and stored, and
the law of every following token is compared with that of the exact past. Bytes are all that is held after the prompt, as
each side allocates it. kvpress drops channels by writing zeros, which saves nothing here and by its own word; what it would
hold without them is computed and marked. A window of Plait's moves on, where the peer's cache grows by each token that
follows: its size is such that both show as many tokens on average. Decoding steps are timed behind the first window, the sides one after the other.

    python bench/peers.py install kvpress
    python bench/compressed_quality.py
    python bench/compressed_quality.py --windows 2 --picture build/bench/compressed_quality.svg --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import peers
from contest import RESULTS
from plait import load
from plait.claims import follow
from plait.claims.machine import Machine
from plait.claims.memories import fidelity
from plait.claims.texts import token_runs
from plait.engine import LanguageModel
from plait.evaluation.picture import check_picture, save_picture
from plait.files import write_text
from plait.memory import MemoryPlan, Rows

FOLLOWING = 128


@dataclass(frozen=True)
class Pair:
    """A memory of Plait and what stands for it elsewhere.

    Args:
        memory: a spec string.
        method: a class of kvpress, or `quantised` for Transformers' cache.
        options: of that.
        share: of the bytes the peer holds, what it would hold if it did not store zeros.
    """

    memory: str
    method: str
    options: dict[str, Any]
    share: float = 1.0


def pairs(prompt: int) -> list[Pair]:
    """What is compared, for prompts of so many tokens."""
    codes = {"backend": "quanto", "q_group_size": 64, "residual_length": 128}
    keep = prompt // 2
    window = keep - 4 + FOLLOWING // 2
    return [
        Pair("think:ratio=0.4", "ThinKPress", {"key_channel_compression_ratio": 0.4, "window_size": 32}, 0.8),
        Pair(
            f"snapkv:capacity={keep},window=32",
            "SnapKVPress",
            {"compression_ratio": 1 - keep / prompt, "window_size": 32},
        ),
        Pair("gear:bits=4", "quantised", {"nbits": 4, **codes}),
        Pair("gear:bits=4,rank=0,rank_decode=0,sparsity=0", "quantised", {"nbits": 4, **codes}),
        Pair("gear:bits=2", "quantised", {"nbits": 2, **codes}),
        Pair(
            f"lm-infinite:local={window},initial=4",
            "StreamingLLMPress",
            {"compression_ratio": 1 - keep / prompt, "n_sink": 4},
        ),
    ]


def ours(lm: LanguageModel, memory: str, windows: list[list[int]], prompt: int, steps: int) -> dict[str, Any]:
    """What Plait keeps and loses, in the form of the peer's answer."""
    found = follow(fidelity(lm, {memory: MemoryPlan.parse(memory)}, windows, prompt), lambda _: None)[memory]
    past = lm.model.new_past(MemoryPlan.parse(memory))
    lm.new_engine().read(windows[0][:prompt], past)
    seconds = []
    with torch.inference_mode():
        for at in range(prompt, prompt + steps):
            start = time.perf_counter()
            token = torch.tensor([windows[0][at]])
            lm.model.answer(token, Rows([(1, len(past))]), [past], wanted=torch.tensor([0]))
            past.commit()
            seconds.append(time.perf_counter() - start)
    return {**vars(found), "seconds": seconds}


def theirs(pair: Pair, windows: list[list[int]], prompt: int, steps: int, threads: int) -> dict[str, Any]:
    """The peer's answer, from a process of its own."""
    peer = peers.PEERS["kvpress"]
    given = json.dumps({"threads": threads, "folder": peers.folder()})
    task = {
        "windows": windows,
        "prompt": prompt,
        "method": pair.method,
        "options": pair.options,
        "steps": steps,
    }
    done = subprocess.run(
        [peer.python, peers.HERE / "sides" / peer.script, given],
        input=json.dumps(task) + "\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) != 2:
        raise SystemExit(f"error: {pair.method} failed: {done.stderr.strip()[-2000:]}")
    answer: dict[str, Any] = json.loads(lines[1])
    return {**answer, "version": json.loads(lines[0])["version"]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path, help="draw loss against bytes into this file")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not peers.PEERS["kvpress"].is_installed:
        print("error: kvpress is not installed; run `python bench/peers.py install kvpress`", file=sys.stderr)
        return 1
    RESULTS.mkdir(parents=True, exist_ok=True)
    if options.picture:
        check_picture(options.picture)
    torch.set_num_threads(options.threads)
    lm = load("smollm2", weights="fp32")
    windows = token_runs(lm.tokenizer, [options.prompt + FOLLOWING] * options.windows)
    rows = []
    known: dict[str, dict[str, Any]] = {}
    for pair in pairs(options.prompt):
        for side, name in (("plait", pair.memory), ("peer", f"{pair.method} {json.dumps(pair.options)}")):
            print(f"{name} ...", file=sys.stderr)
            if side == "plait":
                found = ours(lm, pair.memory, windows, options.prompt, options.steps)
            else:
                if name not in known:
                    known[name] = theirs(pair, windows, options.prompt, options.steps, options.threads)
                found = known[name]
            held = statistics.mean(found["nbytes"])
            rows.append(
                {
                    "side": side if side == "plait" else found["version"],
                    "method": name,
                    "divergence": statistics.mean(found["divergence"]),
                    "nats": statistics.mean(found["nats"]),
                    "agreement": statistics.mean(found["agreement"]),
                    "nbytes": held,
                    "nbytes_without_zeros": held if side == "plait" else held * pair.share,
                    "milliseconds": 1000 * statistics.median(found["seconds"]),
                }
            )
    settings = {name: getattr(options, name) for name in ("windows", "prompt", "steps", "threads")}
    result = {"machine": str(Machine.this()), **settings, "rows": rows}
    write_text(RESULTS / "compressed_quality.json", json.dumps(result, indent=1) + "\n")
    if options.picture:
        picture(rows, options.picture)
    if options.json:
        print(json.dumps(result, indent=1))
        return 0
    print(f"{'method':80}{'KL, nats':>10}{'MB':>8}{'(MB)':>8}{'ms/token':>10}")
    for row in rows:
        print(
            f"{row['method'][:78]:80}{row['divergence']:10.5f}{row['nbytes'] / 1e6:8.2f}"
            f"{row['nbytes_without_zeros'] / 1e6:8.2f}{row['milliseconds']:10.1f}"
        )
    return 0


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Divergence from the exact past against the bytes that are held."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    names = {row["method"]: row for row in rows}
    for name, row in names.items():
        mark = "o" if row["side"] == "plait" else "x"
        axis.scatter(row["nbytes"] / 1e6, row["divergence"], marker=mark, label=f"{row['side']}: {name}"[:90])
    axis.set_xlabel("MB held behind the prompt, zeros that the peer stores included")
    axis.set_ylabel("KL from the exact past, nats a token")
    axis.set_xscale("log")
    axis.set_yscale("log")
    figure.legend(loc="outside lower center", fontsize=6)
    save_picture(figure, path)


if __name__ == "__main__":
    sys.exit(main())
