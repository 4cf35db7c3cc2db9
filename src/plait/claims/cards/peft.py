"""Adapters on packed weights: as good as on full precision, and many in one batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run

if TYPE_CHECKING:
    from plait.engine import LanguageModel

__all__ = ["CLAIM"]

_METHODS = (
    "lora:rank=8",
    "dora:rank=8",
    "vera:rank=64",
    "adalora:rank=4,first_rank=8",
    "ia3",
    "bitfit",
    "serial:size=16",
    "parallel:size=16",
    "lora:rank=8,targets=attention",
    "lora:rank=16,targets=feed_forward",
)
_PROMPT = "The adapter that answers this was chosen by its name, and the text goes on as follows:"


def _add_random(lm: LanguageModel, specs: Sequence[str], seed: int) -> list[str]:
    """Give a model an adapter of each kind with random numbers; their names."""
    import torch

    from plait.nn import new_adapter
    from plait.weights.adapters import ADAPTERS

    generator = torch.Generator().manual_seed(seed)
    names = []
    for number, spec in enumerate(specs):
        made = new_adapter(ADAPTERS.parse(spec), lm.model, seed=number, name=f"{spec} {number}")
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        lm.adapters[made.name] = made.eval()
        names.append(made.name)
    return names


def _answers(
    lm: LanguageModel, names: Sequence[str], tokens: int
) -> list[tuple[tuple[int, float | None], ...]]:
    """What one engine answers to a request for each name, all at once, with log-probabilities."""
    engine = lm.new_engine()
    ids = lm.encode(_PROMPT)
    sequences = [
        engine.submit(lm.request(ids, max_new_tokens=tokens, ignore_end=True, adapter=name, logprobs=1))
        for name in names
    ]
    for _ in engine.run():
        pass
    return [tuple((one.token, one.logprob) for one in sequence.choices) for sequence in sequences]


def _measure(run: Run) -> Measurements:
    from plait.claims.tuning import adapter_learned
    from plait.engine import load
    from plait.weights import Packed

    lm = load("smollm2")
    yield "ten adapters in one batch, and each alone"
    tokens = run.pick(24, 3)
    names = _add_random(lm, _METHODS, run.seed)
    together = _answers(lm, [*names, "none"], tokens)
    alone = [_answers(lm, [name], tokens)[0] for name in (*names, "none")]
    equal = sum(a == b for a, b in zip(together, alone, strict=True)) / len(alone)

    yield "sixteen requests with eight adapters of rank 8"
    rank_8 = _add_random(lm, ["lora:rank=8,targets=all"] * 8, run.seed + 1)
    in_batch: list[float] = []
    in_turns: list[float] = []
    without: list[float] = []
    for _ in range(run.pick(3, 1)):
        for into, batches in (
            (in_batch, [[name for name in rank_8 for _ in range(2)]]),
            (in_turns, [[name, name] for name in rank_8]),
            (without, [["none"] * 16]),
        ):
            started = time.perf_counter()
            for batch in batches:
                _answers(lm, batch, tokens)
            into.append(time.perf_counter() - started)
    turns = [a / b for a, b in zip(in_turns, in_batch, strict=True)]
    plain = [a / b for a, b in zip(without, in_batch, strict=True)]

    yield "training on full precision"
    before, full, parameters, *_ = adapter_learned(run, "lora", "fp32")
    yield "training on the file's own four bits"
    file_before, in_file, *_ = adapter_learned(run, "lora", "auto")
    yield "training on other four bits"
    packed_before, packed, *_ = adapter_learned(run, "lora", "bitmod:bits=4,group=64")
    sizes = [module.shape for module in lm.model.modules() if isinstance(module, Packed)]
    return {
        "same_bits_in_a_batch": Quantity(equal, "of answers", samples=len(alone)),
        "faster_than_in_turns": Quantity.median(turns, "x"),
        "speed_of_no_adapters": Quantity.median(plain, "x"),
        "loss_before_fp32": Quantity(before, "nats/token"),
        "loss_before_file": Quantity(file_before, "nats/token"),
        "loss_before_packed": Quantity(packed_before, "nats/token"),
        "loss_fp32": Quantity(full, "nats/token"),
        "loss_file": Quantity(in_file, "nats/token"),
        "loss_packed": Quantity(packed, "nats/token"),
        "loss_file_over_fp32": Quantity(in_file / full, "x"),
        "loss_packed_over_fp32": Quantity(packed / full, "x"),
        "nats_packed_above_fp32": Quantity(packed - full, "nats/token"),
        "trained_share": Quantity(
            parameters / sum(rows * columns for rows, columns in sizes), "of the model"
        ),
    }


CLAIM = Claim(
    name="peft",
    title="Adapters on packed weights, many in one batch",
    source="Han et al. 2024, arXiv:2403.14608",
    headline=(
        "A survey of parameter-efficient tuning: few numbers are trained beside a frozen model, which may be kept in few "
        "bits, and many adapters can be served on one model."
    ),
    scale=(
        "SmolLM2-135M-Instruct. LoRA of rank 8 on all matrices of the blocks, 40 steps of 256 tokens of Python's standard "
        "library (modules a to m) from the same start on the same batches, the model in fp32, as the file has it (Q4_1) and packed again in "
        "bitmod:bits=4,group=64; "
        "loss on 2,048 tokens of other modules and the manual. Ten adapters of eight methods and the plain model in one "
        "batch, 24 tokens with log-probabilities, against each alone. Sixteen requests of 24 tokens with eight adapters "
        "of rank 8: all in one engine, two at a time, and without adapters, in turns."
    ),
    bars=(
        Bar(
            quantity="loss_file_over_fp32",
            relation="<=",
            value=1.02,
            unit="x",
            why="Training beside packed weights must not cost more than 2% of the loss.",
        ),
        Bar(
            quantity="loss_packed_over_fp32",
            relation="<=",
            value=1.02,
            unit="x",
            why="The same where the model was packed a second time, in 4 bits of another grid.",
        ),
        Bar(
            quantity="nats_packed_above_fp32",
            relation="<=",
            value=0.05,
            unit="nats/token",
            why="The same in nats, as the card of the survey has it.",
        ),
        Bar(
            quantity="same_bits_in_a_batch",
            relation=">=",
            value=1.0,
            unit="of answers",
            why="Tokens and log-probabilities do not depend on whose requests are in the batch.",
        ),
        Bar(
            quantity="faster_than_in_turns",
            relation=">=",
            value=3.0,
            unit="x",
            why="What one batch of all adapters is for.",
        ),
        Bar(
            quantity="speed_of_no_adapters",
            relation=">=",
            value=0.7,
            unit="x",
            why="Adapters of rank 8 are little work beside the model.",
        ),
        Bar(
            quantity="trained_share",
            relation="<=",
            value=0.03,
            unit="of the model",
            why="Gradients and optimizer state take that share of what full tuning needs.",
        ),
    ),
    measure=_measure,
)
