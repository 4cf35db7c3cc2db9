"""Prompts of uneven length are read side by side, without padding."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from plait.claims.claim import Bar, Claim, MeasurementError, Measurements, Quantity, Run
from plait.claims.greedy import NEEDS

if TYPE_CHECKING:
    from torch import Tensor

    from plait.engine import LanguageModel
    from plait.memory import Past

__all__ = ["CLAIM"]

_SORTED_BATCH = 8


def _prompts(lm: LanguageModel, count: int, longest: int, pick: random.Random) -> list[list[int]]:
    """Runs of Python's manual with lengths from a log-normal law of median 60; one is the longest."""
    from plait.claims.texts import manual

    lengths = [min(max(int(pick.lognormvariate(4.1, 0.9)), 8), longest) for _ in range(count)]
    lengths[pick.randrange(count)] = longest
    ids = lm.encode(manual())
    return [
        ids[start : start + length] for length in lengths for start in [pick.randrange(len(ids) - length)]
    ]


def _spread(count: int, longest: int) -> list[int]:
    """Lengths from 8 to the longest, each a little larger than the one before by the same factor."""
    return [round(8 * (longest / 8) ** (number / (count - 1))) for number in range(count)]


def _packed(lm: LanguageModel, prompts: list[list[int]]) -> list[Past]:
    """Everything in one pass, or in the passes that packing chooses."""
    from plait.engine.prefill import read_packed

    pasts = [lm.model.new_past(lm.plan) for _ in prompts]
    read_packed(lm.model, prompts, pasts)
    return pasts


def _padded(lm: LanguageModel, prompts: list[list[int]]) -> list[Past]:
    """Every prompt as long as the longest, padded at its end, in one pass of the same engine."""
    import torch

    from plait.memory import Rows

    longest = max(len(prompt) for prompt in prompts)
    pasts = [lm.model.new_past(lm.plan) for _ in prompts]
    ids = [[*prompt, *([0] * (longest - len(prompt)))] for prompt in prompts]
    with torch.inference_mode():
        lm.model(torch.tensor(ids).flatten(), Rows([(longest, 0)] * len(prompts)), pasts)
    for prompt, past in zip(prompts, pasts, strict=True):
        past.commit()
        past.truncate(len(prompt))
    return pasts


def _sorted_batches(lm: LanguageModel, prompts: list[list[int]]) -> list[Past]:
    """Padded batches of prompts of nearly equal lengths."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    pasts: dict[int, Past] = {}
    for start in range(0, len(order), _SORTED_BATCH):
        chosen = order[start : start + _SORTED_BATCH]
        pasts |= zip(chosen, _padded(lm, [prompts[index] for index in chosen]), strict=True)
    return [pasts[index] for index in range(len(prompts))]


def _one_by_one(lm: LanguageModel, prompts: list[list[int]]) -> list[Past]:
    pasts = [lm.model.new_past(lm.plan) for _ in prompts]
    for prompt, past in zip(prompts, pasts, strict=True):
        lm.new_engine(rows_per_step=max(len(prompt), 1)).read(prompt, past)
    return pasts


def _first_token_seconds(lm: LanguageModel, prompts: list[list[int]]) -> list[float]:
    """When each of several requests that come together has its first token."""
    engine = lm.new_engine(max_sequences=len(prompts), share_prefixes=False)
    start = time.perf_counter()
    waiting = [engine.submit(lm.request(ids, max_new_tokens=2, ignore_end=True)) for ids in prompts]
    seconds = []
    while waiting:
        engine.step()
        now = time.perf_counter() - start
        seconds += [now for sequence in waiting if sequence.choices]
        waiting = [sequence for sequence in waiting if not sequence.choices]
    return seconds


def _difference(one: list[Past], other: list[Past]) -> float:
    """Largest difference of keys and values over all prompts and layers."""
    worst = []
    for a, b in zip(one, other, strict=True):
        for mine, yours in zip(a.memories("compared"), b.memories("compared"), strict=True):
            worst.append(float((mine.tail.keys - yours.tail.keys).abs().max()))
            worst.append(float((mine.tail.values - yours.tail.values).abs().max()))
    return max(worst)


class _Peak(NamedTuple):
    """What reading prompts takes.

    Attributes:
        held: bytes of keys and values, counted.
        resident: bytes by which the process grew at its highest, keys and values included.
    """

    held: int
    resident: int


# A process of its own, so that no memory is reused that another way of reading has let go.
_CHILD = "from plait.claims.cards.prepacking import tell_peak; tell_peak()"


def tell_peak() -> None:
    """In a fresh process: read the prompts on standard input in one way, and print what that took."""
    import torch

    from plait.engine import load
    from plait.memory import allocated_bytes

    task = json.loads(sys.stdin.read())
    torch.set_num_threads(task["threads"])
    lm = load("smollm2", weights="fp32")
    way = {"packed": _packed, "padded": _padded}[task["way"]]
    # What the first pass allocates for good is no part of it.
    way(lm, [prompt[:2] for prompt in task["prompts"][:2]])
    Path("/proc/self/clear_refs").write_text("5")  # the highest is the present one
    before = _status("VmRSS")
    pasts = way(lm, task["prompts"])
    resident = _status("VmHWM") - before
    strands = [strand for past in pasts for memory in past.memories("counted") for strand in memory.held()]
    sys.stdout.write(json.dumps([allocated_bytes(strands), resident]))


def _status(name: str) -> int:
    """A number of bytes from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _peak(way: str, prompts: list[list[int]]) -> _Peak:
    """What a fresh process takes to read the prompts in one way.

    Raises:
        MeasurementError: the process failed, or this system does not count what a process takes.
    """
    import torch

    task = json.dumps({"way": way, "prompts": prompts, "threads": torch.get_num_threads()})
    child = subprocess.run(
        [sys.executable, "-c", _CHILD], input=task, capture_output=True, text=True, check=False
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise MeasurementError(f"A fresh process could not read {way} prompts: {last}")
    return _Peak(*json.loads(child.stdout))


def _peer(prompts: list[list[int]]) -> Callable[[], Tensor]:
    """Transformers' forward pass over the prompts, padded as its users pad them."""
    import torch

    from plait.claims.greedy import load_peer
    from plait.hub import resolve

    peer = load_peer(resolve("smollm2"))
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def read() -> Tensor:
        with torch.inference_mode():
            answer = peer(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
        logits: Tensor = answer.logits
        return logits

    return read


def _measure(run: Run) -> Measurements:
    from plait.engine import load
    from plait.memory.arrangements import pack

    pick = random.Random(run.seed)
    bins: dict[str, int] = {"ffd": 0, "bfd": 0, "exact": 0}
    for _ in range(run.pick(200, 10)):
        lengths = [pick.randint(1, 100) for _ in range(pick.randint(1, 12))]
        for method in ("ffd", "bfd", "exact"):
            bins[method] += len(pack(lengths, 120, method))

    yield "loading SmolLM2"
    lm = load("smollm2", weights="fp32")
    prompts = _prompts(lm, *run.pick((32, 512), (6, 64)), pick)
    equal = [prompts[0][:1] * run.pick(64, 16) for _ in range(run.pick(16, 4))]
    padding = len(prompts) * max(map(len, prompts)) / sum(map(len, prompts))
    yield "comparing keys and values"
    difference = _difference(_packed(lm, prompts), _one_by_one(lm, prompts))
    if difference > 1e-4:
        raise MeasurementError(
            f"Keys or values of packed and of single prompts differ by {difference:.2g}, so no speed is reported."
        )
    peaks = {}
    for way in ("packed", "padded"):
        yield f"what a process takes to read {way} prompts"
        peaks[way] = _peak(way, prompts)
    ways: dict[str, Callable[[], object]] = {
        "packed": lambda: _packed(lm, prompts),
        "padded": lambda: _padded(lm, prompts),
        "sorted": lambda: _sorted_batches(lm, prompts),
        "equal_packed": lambda: _packed(lm, equal),
        "equal_padded": lambda: _padded(lm, equal),
    }
    yield "loading Transformers"
    ways["transformers"] = _peer(prompts)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    rounds = run.pick(3, 1)
    for number in range(rounds + 1):
        for way in list(ways)[:: 1 if number % 2 else -1]:
            yield f"{way.replace('_', ' ')}, {f'round {number} of {rounds}' if number else 'warm-up'}"
            start = time.perf_counter()
            ways[way]()
            if number:
                seconds[way].append(time.perf_counter() - start)

    mixed = [prompts[0][:1] * length for length in _spread(*run.pick((16, 1024), (4, 64)))]
    waits = []
    for number in range(rounds + 1):
        yield f"mixed requests, {f'round {number} of {rounds}' if number else 'warm-up'}"
        ours = statistics.fmean(_first_token_seconds(lm, mixed))
        start = time.perf_counter()
        _padded(lm, mixed)
        if number:
            waits.append((time.perf_counter() - start) / ours)

    def ratio(slow: str, fast: str, factor: float = 1.0) -> Quantity:
        pairs = zip(seconds[slow], seconds[fast], strict=True)
        return Quantity.median([factor * a / b for a, b in pairs], "x")

    return {
        "padding_ratio": Quantity(padding, "x", samples=len(prompts)),
        "max_difference": Quantity(difference, ""),
        **{f"peak_{way}": Quantity(peak.resident / 1e6, "MB") for way, peak in peaks.items()},
        **{f"held_{way}": Quantity(peak.held / 1e6, "MB") for way, peak in peaks.items()},
        "peak_over_padded": Quantity(peaks["packed"].resident / peaks["padded"].resident, "x"),
        "held_over_padded": Quantity(peaks["packed"].held / peaks["padded"].held, "x"),
        "speedup_over_padded": ratio("padded", "packed"),
        "share_of_padding_saved": ratio("padded", "packed", 1 / padding),
        "speedup_over_sorted": ratio("sorted", "packed"),
        "speedup_over_transformers": ratio("transformers", "packed"),
        "equal_lengths_slowdown": ratio("equal_packed", "equal_padded"),
        "first_token_speedup": Quantity.median(waits, "x"),
        "bins_ffd_over_fewest": Quantity(bins["ffd"] / bins["exact"], "x"),
        "bins_bfd_over_fewest": Quantity(bins["bfd"] / bins["exact"], "x"),
    }


CLAIM = Claim(
    name="prepacking",
    title="Prompts are read without padding",
    headline=(
        "Packed prompts are read 1.6 to 3.5 times as fast as padded ones, and up to 16 times as many fit in memory (models "
        "of 1.3B to 7B, GPU)."
    ),
    source="Zhao et al. 2024, Prepacking, arXiv:2404.09529",
    scale=(
        "SmolLM2-135M-Instruct in fp32; 32 runs of Python's manual, log-normal lengths of median 60, the longest 512; keys and "
        "values of every prompt compared with those of reading it alone. Padded to the longest, and in batches of 8 sorted by "
        "length, in the same engine; Transformers padded on the left. Memory: what a fresh process takes for "
        "one such pass at its highest, and the keys and values that it holds then. Mixed: 16 requests of 8 to 1,024 tokens that come together, the mean time to their first tokens, against one padded pass. Turns in 3 rounds after a warm-up, medians of ratios."
    ),
    bars=(
        Bar(
            quantity="max_difference",
            relation="<=",
            value=1e-4,
            unit="",
            why="Only rounding may differ, in keys that reach some tens; a prompt must not notice its neighbours.",
        ),
        Bar(
            quantity="padding_ratio",
            relation=">=",
            value=3.0,
            unit="x",
            why="Lengths must be as uneven as the method is for; equal ones are measured apart.",
        ),
        Bar(
            quantity="peak_over_padded",
            relation="<=",
            value=0.5,
            unit="x",
            why="What a process takes for rows, keys and values grows with the tokens that are read, and most of the padded are none.",
        ),
        Bar(
            quantity="held_over_padded",
            relation="<=",
            value=0.5,
            unit="x",
            why="Keys and values of padding are stored too, until they are forgotten.",
        ),
        Bar(
            quantity="share_of_padding_saved",
            relation=">=",
            value=0.8,
            unit="x",
            why="The speedup is predicted by the ratio of padded to real tokens.",
        ),
        Bar(
            quantity="speedup_over_sorted",
            relation=">=",
            value=1.1,
            unit="x",
            why="Sorting by length leaves some padding and takes several passes.",
        ),
        Bar(
            quantity="speedup_over_transformers",
            relation=">=",
            value=2.0,
            unit="x",
            why="The peer pads, and most of its rows are padding.",
        ),
        Bar(
            quantity="first_token_speedup",
            relation=">=",
            value=1.5,
            unit="x",
            why="Requests of uneven lengths that come together must not wait for padding.",
        ),
        Bar(
            quantity="equal_lengths_slowdown",
            relation="<=",
            value=1.05,
            unit="x",
            why="Without padding to save, packing is a plain batch.",
        ),
    ),
    measure=_measure,
    needs=NEEDS,
)
