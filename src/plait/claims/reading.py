"""Reading a text through a memory, and memories that are filled without a model, for claims about memories."""

from __future__ import annotations

import random
import time
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plait.engine import LanguageModel
    from plait.memory import Memory, Past

__all__ = [
    "FILLER",
    "PASS_KEY_BEGIN",
    "PASS_KEY_QUESTION",
    "decode_times",
    "fill",
    "filled_past",
    "pass_key_said",
    "pass_keys",
    "pass_keys_found",
    "pass_keys_found_in_prompts",
    "token_nats",
]

PASS_KEY_BEGIN = "There is an important piece of information hidden inside a lot of irrelevant text. Find it and remember it.\n"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
PASS_KEY_QUESTION = "\nWhat is the pass key? The pass key is"


def token_nats(lm: LanguageModel, memory: str | Past, ids: Sequence[int], chunk: int = 256) -> list[float]:
    """Negative log-probability of each token but the first, in nats, read in chunks through a memory.

    Args:
        lm: the model.
        memory: a spec string, or an empty past that holds all of them in the end.
        ids: the tokens.
        chunk: tokens of a forward pass.
    """
    import torch

    from plait.memory import MemoryPlan, Rows

    past = lm.model.new_past(MemoryPlan.parse(memory)) if isinstance(memory, str) else memory
    nats: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(ids), chunk):
            rows = torch.tensor(ids[start : start + chunk])
            hidden = lm.model(rows, Rows([(len(rows), start)]), [past])
            past.commit(is_prompt=start + chunk < len(ids))
            following = torch.tensor(ids[start + 1 : start + chunk + 1])
            law = lm.model.logits(hidden[: len(following)]).log_softmax(dim=-1)
            nats += (-law.gather(1, following[:, None])[:, 0]).tolist()
    return nats


def fill(memory: Memory, length: int, seed: int = 0, chunk: int = 256) -> None:
    """Make one layer remember random tokens up to a length, as if they had been read in chunks."""
    import torch

    heads = memory.heads
    random = torch.Generator().manual_seed(seed)
    keys = torch.randn(chunk, heads.num_kv_heads, heads.head_dim, generator=random)
    values = torch.randn(chunk, heads.num_kv_heads, heads.value_dim or heads.head_dim, generator=random)
    while len(memory) < length:
        count = min(chunk, length - len(memory))
        memory.append(keys[:count], values[:count])
        memory.commit(is_prompt=True)


def filled_past(lm: LanguageModel, memory: str, length: int) -> Past:
    """A past of that many random tokens: what time and bytes depend on, without the time to read them."""
    from plait.memory import Memory, MemoryPlan

    past = lm.model.new_past(MemoryPlan.parse(memory))
    for number, layer in enumerate(past.layers):
        assert isinstance(layer, Memory)
        fill(layer, length, seed=number)
    return past


def pass_key_said(key: str) -> str:
    """The sentences that hide a pass key in a text."""
    return f"The pass key is {key}. Remember it. {key} is the pass key. "


def pass_keys(seed: int, count: int, deepest: float) -> dict[str, float]:
    """Random keys of five digits and their depths in a text, in rising order from 0.05 to the deepest."""
    draw = random.Random(seed)
    depths = sorted(draw.uniform(0.05, deepest) for _ in range(count))
    return {str(draw.randrange(10_000, 100_000)): depth for depth in depths}


def pass_keys_found(lm: LanguageModel, memory: str, length: int, keys: Mapping[str, float]) -> list[bool]:
    """Whether the answer behind a text in which a pass key is hidden is that key, for each key.

    The question is read apart from the text before it, as that of a conversation would be.

    Args:
        lm: the model.
        memory: a spec string.
        length: tokens of the text.
        keys: pass keys and their depths, as a part of the length and in rising order; what stands before one is read once.
    """
    filler, question = _filler_and_question(lm)
    found = []
    with lm.with_memory(memory).session() as trunk:
        trunk.read(PASS_KEY_BEGIN)
        for key, depth in keys.items():
            trunk.read_tokens(filler * max((int(length * depth) - len(trunk)) // len(filler), 0))
            (branch,) = trunk.fork()
            with branch:
                branch.read(pass_key_said(key))
                rest = max((length - len(branch) - len(question)) // len(filler), 0)
                branch.read_tokens(filler * rest)
                # What was read before a fork is stored.
                branch.fork()
                branch.read_tokens(question)
                found.append(key in branch.generate(max_new_tokens=8).text)
    return found


def pass_keys_found_in_prompts(
    lm: LanguageModel, memory: str, length: int, keys: Mapping[str, float]
) -> list[bool]:
    """The same as `pass_keys_found` where each text and its question are one prompt."""
    filler, question = _filler_and_question(lm)
    twin = lm.with_memory(memory)
    begin = twin.encode(PASS_KEY_BEGIN)
    found = []
    for key, depth in keys.items():
        said = twin.tokenizer.encode(pass_key_said(key))
        before = filler * max((int(length * depth) - len(begin)) // len(filler), 0)
        rest = max((length - len(begin) - len(before) - len(said) - len(question)) // len(filler), 0)
        with twin.session() as session:
            session.read_tokens([*begin, *before, *said, *filler * rest, *question])
            found.append(key in session.generate(max_new_tokens=8).text)
    return found


def _filler_and_question(lm: LanguageModel) -> tuple[list[int], list[int]]:
    return lm.tokenizer.encode(FILLER), lm.tokenizer.encode(PASS_KEY_QUESTION)


def decode_times(
    lm: LanguageModel, pasts: Mapping[str, Past], *, steps: int, rounds: int
) -> Generator[str, None, dict[str, list[float]]]:
    """Seconds a token of decoding behind each past: pasts take turns, after one round of warm-up."""
    import torch

    from plait.memory import Rows

    seconds: dict[str, list[float]] = {name: [] for name in pasts}
    with torch.inference_mode():
        for number in range(rounds + 1):
            yield f"decoding, round {number} of {rounds}" if number else "decoding, warm-up"
            for name in list(pasts)[:: 1 if number % 2 else -1]:
                past = pasts[name]
                start = time.perf_counter()
                for token in range(steps):
                    rows = Rows([(1, len(past))])
                    lm.model.answer(torch.tensor([token + 100]), rows, [past], wanted=torch.tensor([0]))
                    past.commit()
                if number:
                    seconds[name].append((time.perf_counter() - start) / steps)
    return seconds
