"""Packed weights in native form say what the same file says dequantised to fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run
from plait.claims.greedy import by_plait

if TYPE_CHECKING:
    from plait.engine import LanguageModel

__all__ = ["CLAIM"]

_PROMPTS, _NEW_TOKENS, _BATCH = 50, 100, 10
_TEXT = 24_000


def quality_prompts(lm: LanguageModel) -> list[list[int]]:
    """Questions, edits, passages to be repeated, beginnings of texts, and beginnings of chapters of the manual."""
    from plait.claims.prompts import chat_prompts, copying_prompts, plain_prompts
    from plait.claims.texts import chapters

    asked = [*chat_prompts(lm), *copying_prompts(lm), *plain_prompts(lm)]
    begun = [lm.encode(text[:400]) for text in chapters().values() if len(text) > 400]
    return [*asked, *begun][:_PROMPTS]


def _measure(run: Run) -> Measurements:
    from plait.claims.texts import manual
    from plait.engine import load

    yield "loading SmolLM2 twice"
    packed, exact = load("smollm2"), load("smollm2", weights="fp32")
    prompts = quality_prompts(exact)
    new_tokens = run.pick(_NEW_TOKENS, 20)
    same = 0
    for start in range(0, len(prompts), _BATCH):
        yield f"prompts {start + 1} to {min(start + _BATCH, len(prompts))} of {len(prompts)}"
        answers = [by_plait(lm, prompts[start : start + _BATCH], new_tokens) for lm in (packed, exact)]
        same += sum(ours == theirs for ours, theirs in zip(*answers, strict=True))
    yield "reading a text with both"
    text = manual()[: run.pick(_TEXT, 2000)]
    perplexity, reference = (lm.score(text).perplexity for lm in (packed, exact))
    return {
        "identical": Quantity(same / len(prompts), "of prompts", samples=len(prompts)),
        "perplexity_change": Quantity(abs(perplexity / reference - 1), "of it"),
        "perplexity": Quantity(perplexity, ""),
        "perplexity_in_fp32": Quantity(reference, ""),
        "new_tokens": Quantity(new_tokens, "tokens"),
    }


CLAIM = Claim(
    name="native-quality",
    title="What packed weights say",
    headline="Native decoding of a 4-bit file says what its weights say in fp32.",
    scale=(
        "SmolLM2-135M-Instruct (GGUF Q4_1), native against dequantised to fp32; 50 prompts of chat, code, copying and "
        "Python's manual with 100 greedy tokens each, and the perplexity of 24,000 characters of the manual."
    ),
    bars=(
        Bar(
            quantity="identical",
            relation=">=",
            value=0.8,
            unit="of prompts",
            why="Activations are rounded to 15 bits, so that only close choices can differ.",
        ),
        Bar(
            quantity="perplexity_change",
            relation="<=",
            value=0.003,
            unit="of it",
            why="Speed must not be bought with quality.",
        ),
    ),
    measure=_measure,
)
