"""Contests between Plait and its peers: one process a side, turns, equal work, medians.

Every side first answers each task once, and every token that it gave is judged by Transformers in fp32: a side
that chooses a token far below the best one computes something else, and its speed is not reported. Then sides take
turns, in an order that changes. Each call adds rounds to a file of results, so that a long contest can be run in
short pieces; medians are over all of them. Another setting, machine or version starts a new file.

A side is a program, or a program and how it speculates: `llama.cpp`, `llama.cpp+lookup`, `plait+token-recycling`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import peers
from peers import HERE, PEERS
from plait.files import write_text

RESULTS = HERE.parent / "build" / "bench"

# In nats below the best token of the fp32 reference. A peer that rounds activations, keys and values to 8 bits was seen
# up to 1.5 below it, at tokens where several are nearly as likely; a wrong mask or position is off by more, everywhere.
FARTHEST = 3.0


@dataclass(frozen=True)
class Task:
    """What every side is given.

    Args:
        name: in tables and results.
        prompts: token ids.
        tokens: new tokens of every prompt.
        shared: first tokens that all prompts have in common.
        varies: whether the first token is another one in every round, so that nobody's cache knows the prompt.
        apart: whether prompts are continued one after the other, and not at once.
    """

    name: str
    prompts: list[list[int]]
    tokens: int
    shared: int = 0
    varies: bool = False
    apart: bool = False

    @property
    def context(self) -> int:
        """Tokens of keys and values that all prompts need together."""
        if self.apart:
            return max(map(len, self.prompts)) + self.tokens + 8
        own = sum(len(prompt) - self.shared + self.tokens for prompt in self.prompts)
        return self.shared + own + 8

    def message(self, number: int = 0) -> str:
        """The task as a line of the protocol, in round `number`."""
        prompts = self.prompts
        if self.varies and number:
            prompts = [[1000 + number, *prompt[1:]] for prompt in prompts]
        task = {"prompts": prompts, "tokens": self.tokens, "shared": self.shared}
        return json.dumps(task | ({"apart": True} if self.apart else {}))


Measure = Callable[[Task, dict[str, Any]], dict[str, float]]


class Side:
    """A process that answers tasks; it is stopped at the end of a `with` block."""

    def __init__(self, name: str, tasks: Sequence[Task], threads: int, options: dict[str, Any]) -> None:
        self.name = name
        program, _, speculation = name.partition("+")
        peer = PEERS.get(program)
        settings = {
            "threads": threads,
            "context": max(task.context for task in tasks),
            "prompts": max(1 if task.apart else len(task.prompts) for task in tasks),
            "speculation": speculation or None,
            "draft_model": None,
            "draft_folder": None,
            "model": peers.gguf(),
            "folder": peers.folder() if peer and peer.weights == "folder" else None,
            **options,
        }
        environment = {**os.environ, "PLAIT_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        if program == "plait-torch":
            environment["PLAIT_NATIVE"] = "0"
        python, script = (sys.executable, "plait_side.py") if peer is None else (peer.python, peer.script)
        self.errors = RESULTS / f"{name}.log"
        with self.errors.open("w") as log:
            self.process = subprocess.Popen(
                [python, HERE / "sides" / script, json.dumps(settings)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            )  # fmt: skip
        self.version = str(self.answer()["version"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, message: str) -> dict[str, Any]:
        """Send a line and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(message + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line that the side writes."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: {self.name} ended with code {self.process.wait()}; see {self.errors}")
        found: dict[str, Any] = json.loads(line)
        return found


@dataclass
class Results:
    """What was measured so far: for each task and side, quantities with one value for each round."""

    setting: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    gaps: dict[str, float] = field(default_factory=dict)
    equal: dict[str, str] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, setting: dict[str, Any]) -> Results:
        """Those of a file, if it is of this setting; else none."""
        if path.exists():
            found = json.loads(path.read_text())
            if found["setting"] == setting:
                return cls(**{name: found[name] for name in cls.__dataclass_fields__})
        return cls(setting)

    def write(self, path: Path) -> None:
        """Replace the file; medians are written beside the samples."""
        write_text(path, json.dumps({**vars(self), "medians": self.medians()}, indent=1) + "\n")

    def medians(self) -> dict[str, float]:
        """The median of every quantity of a side that answered well."""
        return {name: statistics.median(values) for name, values in self.samples.items()}

    def is_wrong(self, task: str, side: str) -> bool:
        """Whether this side gave a token that the reference does not allow."""
        return self.gaps.get(f"{task}|{side}", 0.0) > FARTHEST


def parser(about: str | None, sides: str) -> argparse.ArgumentParser:
    """The options that every contest has."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--sides", default=sides, help="who takes part, by commas")
    made.add_argument("--rounds", type=int, default=5, help="rounds to add to the results")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument(
        "--memory", default="dense:dtype=fp16", help="Plait's memory; llama.cpp keeps 16 bits too"
    )
    made.add_argument("--weights", default="auto", help="how Plait keeps the matrices")
    made.add_argument("--draft", default="none", help="Plait's speculation")
    made.add_argument("--fresh", action="store_true", help="forget earlier rounds")
    made.add_argument("--json", action="store_true", help="print the file of results")
    return made


def run(
    name: str,
    tasks: Sequence[Task],
    measure: Measure,
    options: argparse.Namespace,
    *,
    who: Sequence[str] | None = None,
    more: dict[str, Any] | None = None,
) -> int:
    """Check every side, run the rounds, write the results, and print them.

    Args:
        name: of the results' file.
        measure: the quantities of one answer.
        who: the sides that take part; those of the options when left out. Plait is compared from the first of its own.
        more: settings of all sides, beside Plait's choices.
    """
    from plait.claims.machine import Machine

    names = present(options.sides.split(",") if who is None else who)
    RESULTS.mkdir(parents=True, exist_ok=True)
    chosen = {"memory": options.memory, "weights": options.weights, "draft": options.draft}
    chosen |= more or {}
    setting = {
        "machine": str(Machine.this()), "threads": options.threads, "plait": chosen,
        "tasks": [[task.name, [len(p) for p in task.prompts], task.tokens, task.shared] for task in tasks],
    }  # fmt: skip
    path = RESULTS / f"{name}.json"
    results = Results(setting) if options.fresh else Results.read(path, setting)
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(side, tasks, options.threads, chosen)) for side in names]
        results.versions |= {side.name: side.version for side in sides}
        first = {side.name: check(side, tasks, results) for side in sides}
        if any(first.values()):
            at_hand = [side for side in sides if side.name == "transformers"]
            reference = (
                at_hand[0]
                if at_hand
                else stack.enter_context(Side("transformers", tasks, options.threads, chosen))
            )
            judge(reference, first, tasks, results)
        results.write(path)
        done = max(map(len, results.samples.values()), default=0)
        for number in range(done, done + options.rounds):
            for task in tasks:
                for side in sides[:: 1 if number % 2 else -1]:
                    if results.is_wrong(task.name, side.name):
                        continue
                    found = measure(task, side.ask(task.message(number + 1)))
                    for quantity, value in found.items():
                        key = f"{task.name}|{quantity}|{side.name}"
                        results.samples.setdefault(key, []).append(value)
            results.write(path)
    print(json.dumps(json.loads(path.read_text()), indent=1) if options.json else table(results))
    return 1 if any(gap > FARTHEST for gap in results.gaps.values()) else 0


def present(names: Sequence[str]) -> list[str]:
    """The sides that can take part; the others are named on standard error."""
    programs = {side: side.partition("+")[0] for side in names}
    if unknown := set(programs.values()) - {"plait", "plait-torch", *PEERS}:
        raise SystemExit(f"error: unknown sides {unknown}; known: plait, plait-torch, {', '.join(PEERS)}")
    for side, program in programs.items():
        known = PEERS[program].speculations if program in PEERS else ()
        if program in PEERS and "+" in side and side.partition("+")[2] not in known:
            raise SystemExit(f"error: {program} has no speculation of that name; known: {', '.join(known)}")
    missing = [side for side, name in programs.items() if name in PEERS and not PEERS[name].is_installed]
    for side in missing:
        print(
            f"{side} takes no part: it is not installed; see `python bench/peers.py install`", file=sys.stderr
        )
    return [side for side in names if side not in missing]


def report(
    name: str,
    as_json: bool,
    unit: str,
    what: str,
    samples: dict[str, list[float]],
    middle: Callable[[list[float]], float],
) -> int:
    """Write and print one quantity of every side."""
    found = {
        side: {"median": middle(values), "samples": values} for side, values in samples.items() if values
    }
    text = json.dumps({"what": what, "unit": unit, "sides": found}, indent=1)
    write_text(RESULTS / f"{name}.json", text + "\n")
    print(
        text if as_json else "\n".join(f"{what}  {k:14}{v['median']:10.2f} {unit}" for k, v in found.items())
    )
    return 0


def check(side: Side, tasks: Sequence[Task], results: Results) -> dict[str, list[list[int]]]:
    """One answer to each task that was not judged yet; every task warms the side up."""
    found = {}
    for task in tasks:
        if f"{task.name}|{side.name}" in results.gaps:
            # It has answered in an earlier call; a few tokens warm this process up.
            side.ask(Task(task.name, [prompt[-8:] for prompt in task.prompts], 2).message())
        else:
            found[task.name] = side.ask(task.message())["tokens"]
    return found


def judge(
    reference: Side, answers: dict[str, dict[str, list[list[int]]]], tasks: Sequence[Task], results: Results
) -> None:
    """Note how far each side's tokens are below the best ones of the fp32 reference."""
    for name, found in answers.items():
        for task in tasks:
            if task.name not in found:
                continue
            # The reference reads every prompt again, which takes long: of many prompts the first and the last do.
            chosen = range(len(task.prompts)) if len(task.prompts) <= 8 else (0, len(task.prompts) - 1)
            message = {
                "prompts": [task.prompts[i] for i in chosen],
                "continuations": [found[task.name][i] for i in chosen],
            }
            gaps = reference.ask(json.dumps(message))["gaps"]
            key = f"{task.name}|{name}"
            results.gaps[key] = max(gap for each in gaps for gap in each)
            same = sum(all(gap == 0 for gap in each) for each in gaps)
            results.equal[key] = f"{same}/{len(gaps)}"


def table(results: Results) -> str:
    """Medians, the ratio of Plait to each peer, and what the outputs are like."""
    medians = results.medians()
    lines = [results.setting["machine"], "; ".join(f"{k}: {v}" for k, v in results.versions.items()), ""]
    own = next((side for side in results.versions if side.startswith("plait")), "plait")
    width = max(14, *(len(side) + 1 for side in results.versions))
    lines.append(
        f"{'task':22}{'quantity':22}{'side':{width}}{'median':>10}{'low':>10}{'high':>10}  {own}'s ratio"
    )
    for key, value in sorted(medians.items()):
        task, quantity, side = key.split("|")
        values = results.samples[key]
        ours = medians.get(f"{task}|{quantity}|{own}")
        better = (lambda a, b: b / a) if quantity.endswith(("seconds", "MB")) else (lambda a, b: a / b)
        ratio = "" if ours is None or side == own or not value else f"{better(ours, value):.2f}"
        lines.append(
            f"{task:22}{quantity:22}{side:{width}}{value:10.2f}{min(values):10.2f}{max(values):10.2f}  {ratio:>7}"
        )
    lines.append(f"\n{max(map(len, results.samples.values()), default=0)} rounds. Outputs, judged by fp32:")
    for key, gap in sorted(results.gaps.items()):
        verdict = "NO SPEED REPORTED" if gap > FARTHEST else "well"
        lines.append(
            f"  {key}: at most {gap:.3f} nats below the best token, {results.equal[key]} equal; {verdict}"
        )
    return "\n".join(lines)
