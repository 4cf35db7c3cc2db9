"""Greedy answers are those of Transformers, token for token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run
from plait.claims.greedy import NEEDS, by_peer, by_plait, load_peer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from plait.engine import LanguageModel

__all__ = ["CLAIM"]


def _gap(lm: LanguageModel, tokens: Sequence[int]) -> float:
    """Distance of the two largest logits after these tokens: how close the choice was."""
    import torch

    from plait.memory import Rows

    with torch.inference_mode():
        hidden = lm.model(torch.tensor(tokens), Rows([(len(tokens), 0)]))
        best, second = lm.model.logits(hidden[-1:])[0].topk(2).values.tolist()
    return float(best - second)


def _measure(run: Run) -> Measurements:
    from plait.claims.prompts import chat_prompts, copying_prompts, plain_prompts
    from plait.engine import load
    from plait.hub import resolve

    yield "loading SmolLM2 twice"
    lm = load("smollm2", weights="fp32")
    peer = load_peer(resolve("smollm2"))
    prompts = [*chat_prompts(lm), *copying_prompts(lm)[::2], *plain_prompts(lm)]
    prompts = run.pick(prompts, prompts[:2])
    max_new_tokens = run.pick(200, 10)
    same, gaps = 0, []
    for number, prompt in enumerate(prompts):
        yield f"prompt {number + 1} of {len(prompts)}"
        ours = by_plait(lm, [prompt], max_new_tokens)[0]
        theirs = by_peer(peer, [prompt], max_new_tokens)[0]
        if ours == theirs:
            same += 1
        else:
            first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            gaps.append(_gap(lm, [*prompt, *ours[:first]]))
    quantities = {
        "identical": Quantity(same / len(prompts), "of prompts", samples=len(prompts)),
        "new_tokens": Quantity(max_new_tokens, "tokens"),
    }
    if gaps:
        quantities["gap_of_logits_at_the_first_difference"] = Quantity.median(gaps, "")
    return quantities


CLAIM = Claim(
    name="same-text",
    title="The same greedy text as Transformers",
    headline="Greedy answers are those of Hugging Face Transformers, token for token.",
    scale=(
        "SmolLM2-135M-Instruct (GGUF Q4_1, dequantised to fp32 on both sides), 14 prompts one by one: chat, code "
        "edits, copying and plain text; 200 new tokens each, the end-of-sequence token ignored."
    ),
    bars=(
        Bar(
            quantity="identical",
            relation=">=",
            value=1.0,
            unit="of prompts",
            why="The weights and the rule are the same, so only a tie within rounding could differ.",
        ),
    ),
    measure=_measure,
    needs=NEEDS,
)
