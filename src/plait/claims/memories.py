"""What a memory costs: how far a model's next tokens move, how many bytes are held, how long attention takes."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import TYPE_CHECKING

from plait.claims.claim import Quantity, Run

if TYPE_CHECKING:
    from torch import Tensor

    from plait.engine import LanguageModel
    from plait.memory import Heads, MemoryPlan, Past

__all__ = [
    "Fidelity",
    "add_fidelity",
    "attention_against_dense",
    "attention_seconds",
    "fidelity",
    "fp16_bytes",
]

# Rows that are read at the end of a past that is otherwise written directly, so that codecs see queries.
_READ = 64


@dataclass
class Fidelity:
    """How a memory of a prompt changes the tokens behind it; each list has one number for each window.

    Attributes:
        divergence: mean Kullback-Leibler divergence from the exact memory's laws, nats.
        nats: mean increase of the negative log-likelihood of the text, nats a token.
        agreement: fraction of positions with the same most likely token.
        nbytes: bytes held after the prompt.
    """

    divergence: list[float] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)


def fidelity(
    lm: LanguageModel, memories: Mapping[str, MemoryPlan], windows: Sequence[list[int]], prompt: int
) -> Generator[str, None, dict[str, Fidelity]]:
    """Read `prompt` tokens of each window through every memory, and compare its laws of the others with exact ones.

    Prompts are read with exact attention, as an engine reads them; the tokens behind them see the memory.
    """
    import torch

    from plait.memory import MemoryPlan

    found = {name: Fidelity() for name in memories}
    with torch.inference_mode():
        for number, window in enumerate(windows):
            yield f"window {number + 1} of {len(windows)}"
            ids = torch.tensor(window)
            exact = _read(lm, MemoryPlan(), ids[:prompt])
            truth = _laws(lm, exact, ids, prompt)
            following = ids[prompt + 1 :, None]
            for name, plan in memories.items():
                past = _read(lm, plan, ids[:prompt], exact)
                held = past.nbytes()
                laws = _laws(lm, past, ids, prompt)
                divergence = (truth.exp() * (truth - laws)).sum(-1).mean()
                nats = (truth - laws)[:-1].gather(1, following).mean()
                agreement = (truth.argmax(-1) == laws.argmax(-1)).double().mean()
                one = found[name]
                one.divergence.append(float(divergence))
                one.nats.append(float(nats))
                one.agreement.append(float(agreement))
                one.nbytes.append(held)
    return found


def _read(lm: LanguageModel, plan: MemoryPlan, ids: Tensor, exact: Past | None = None) -> Past:
    """A past that holds a prompt; copied from an exact one where the codec does not look at queries."""
    from plait.memory import Memory, Rows

    past = lm.model.new_past(plan)
    if exact is None or plan.codec.new_notes() is not None:
        lm.model(ids, Rows([(len(ids), 0)]), [past])
    else:
        for layer, source in zip(past.layers, exact.layers, strict=True):
            assert isinstance(layer, Memory)
            assert isinstance(source, Memory)
            layer.append(source.tail.keys.transpose(0, 1), source.tail.values.transpose(0, 1))
    past.commit()
    return past


def _laws(lm: LanguageModel, past: Past, ids: Tensor, prompt: int) -> Tensor:
    """Log-probabilities behind each token from the prompt's length on; the past holds the prompt only, after."""
    from plait.memory import Rows

    hidden = lm.model(ids[prompt:], Rows([(len(ids) - prompt, prompt)]), [past])
    past.truncate(prompt)
    return lm.model.logits(hidden).double().log_softmax(-1)


def fp16_bytes(lm: LanguageModel, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens in fp16."""
    from plait.memory import Memory

    heads = [layer.heads for layer in lm.model.new_past(lm.plan).layers if isinstance(layer, Memory)]
    sizes = [one.num_kv_heads * (one.head_dim + (one.value_dim or one.head_dim)) for one in heads]
    return 2 * tokens * sum(sizes)


def add_fidelity(quantities: dict[str, Quantity], found: Mapping[str, Fidelity]) -> None:
    """Note the means over windows of what `fidelity` found, for each memory."""
    for name, one in found.items():
        windows = len(one.divergence)
        quantities[f"{name}_divergence"] = Quantity(mean(one.divergence), "nats", samples=windows)
        quantities[f"{name}_increase"] = Quantity(mean(one.nats), "nats", samples=windows)
        quantities[f"{name}_agreement"] = Quantity(mean(one.agreement), "", samples=windows)


def attention_against_dense(
    run: Run, name: str, plan: MemoryPlan, *, quick_tokens: int
) -> Generator[str, None, dict[str, Quantity]]:
    """Time of a step's attention through a memory beside the dense one, at 8,192 tokens and 8 sequences.

    SmolLM2's geometry: 9 query and 3 key/value heads of size 64.
    """
    from plait.memory import Heads, MemoryPlan

    seconds = yield from attention_seconds(
        Heads(9, 3, 64, scale=64**-0.5),
        {"dense": MemoryPlan(), name: plan},
        tokens=run.pick(8192, quick_tokens),
        batch=run.pick(8, 2),
        rounds=run.pick(9, 2),
        seed=run.seed,
    )
    ratios = [dense / other for dense, other in zip(seconds["dense"], seconds[name], strict=True)]
    return {
        "attention_seconds_dense": Quantity.median(seconds["dense"], "s"),
        f"attention_seconds_{name}": Quantity.median(seconds[name], "s"),
        "attention_speed": Quantity.median(ratios, "x"),
    }


def attention_seconds(
    heads: Heads, memories: Mapping[str, MemoryPlan], *, tokens: int, batch: int, rounds: int, seed: int
) -> Generator[str, None, dict[str, list[float]]]:
    """Seconds of one decoding step's attention in one layer, for sequences with a past of their own.

    The memories take turns in every round, after one that does not count. Keys and values are random:
    time does not depend on them.
    """
    import torch

    from plait.memory import Memory, Rows, attend

    generator = torch.Generator().manual_seed(seed)
    value_dim = heads.value_dim or heads.head_dim

    def rows(count: int) -> tuple[Tensor, Tensor, Tensor]:
        shapes = ((heads.num_heads, heads.head_dim), (heads.num_kv_heads, heads.head_dim))
        q, k = (torch.randn(count, *shape, generator=generator) for shape in shapes)
        return q, k, torch.randn(count, heads.num_kv_heads, value_dim, generator=generator)

    seconds: dict[str, list[float]] = {name: [] for name in memories}
    with torch.inference_mode():
        _, keys, values = rows(tokens - _READ)
        last, step = rows(_READ), rows(batch)
        batches: dict[str, list[Memory]] = {}
        for name, plan in memories.items():
            yield f"filling {batch} memories: {name}"
            batches[name] = [Memory(heads, plan) for _ in range(batch)]
            for memory in batches[name]:
                memory.append(keys, values)
                memory.attend(*last)
                memory.commit()
        for number in range(rounds + 1):
            yield f"round {number} of {rounds}"
            for name, batch_of in batches.items():
                start = time.perf_counter()
                attend(batch_of, *step, Rows([(1, tokens)] * batch))
                if number:
                    seconds[name].append(time.perf_counter() - start)
                for memory in batch_of:
                    memory.truncate(tokens)
    return seconds
