"""Guessing ahead never changes an answer, and copies cost fewer forward passes."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run

if TYPE_CHECKING:
    from plait.engine import LanguageModel

__all__ = ["CLAIM"]


# Guesses with the model's own first layers are right often enough to be accepted, and wrong often enough to be not.
_DRAFTS = (
    "prompt-lookup",
    "token-recycling",
    "mix:prompt-lookup+token-recycling",
    "chain:layers={layers}",
    "rsd-c:layers={layers}",
    "rsd-s:layers={layers}",
    "pearl:layers={layers}",
    "mix:token-recycling+rsd-s:layers={layers}",
)
_BATCH = 8


def _every_draft(run: Run, plain: LanguageModel) -> Generator[str, None, dict[str, Quantity]]:
    """Greedy answers to many prompts with every draft, alone and side by side, against plain ones."""
    from plait.claims.drafts import answers, same_up_to_ties, with_draft
    from plait.claims.texts import other_manual

    paragraphs = [text for chapter in other_manual() for text in chapter.split("\n\n") if len(text) > 200]
    # Beginnings of very different lengths.
    texts = [text[: 20 + 7 * number] for number, text in enumerate(paragraphs[:: len(paragraphs) // 100])]
    prompts = [plain.encode(text) for text in texts[: run.pick(100, 2)]]
    max_new_tokens = run.pick(32, 4)
    layers = len(plain.model.config.blocks) - 2
    yield "plain answers"
    expected = [
        one
        for start in range(0, len(prompts), _BATCH)
        for one in answers(plain, prompts[start : start + _BATCH], max_new_tokens)
    ]
    same = {1: 0, _BATCH: 0}
    for draft in _DRAFTS:
        lm = with_draft(plain, draft.format(layers=layers))
        for size in same:
            yield f"{draft}, {size} at once"
            for start in range(0, len(prompts), size):
                asked = prompts[start : start + size]
                for prompt, wanted, given in zip(
                    asked, expected[start:], answers(lm, asked, max_new_tokens), strict=False
                ):
                    same[size] += same_up_to_ties(plain, prompt, wanted, given)
    count = len(prompts) * len(_DRAFTS)
    return {
        "identical_every_draft_alone": Quantity(same[1] / count, "of answers", samples=count),
        "identical_every_draft_batch_8": Quantity(same[_BATCH] / count, "of answers", samples=count),
    }


def _sampled_laws(run: Run) -> Generator[str, None, dict[str, Quantity]]:
    """Texts drawn with every speculator, and with mistakes, against the exact law."""
    import os

    from plait.claims.sampled_laws import MISTAKES, SPECULATORS, fits

    samples = run.pick(200_000, 400)
    counts = dict.fromkeys(SPECULATORS, samples) | dict.fromkeys(MISTAKES, run.pick(samples // 10, 1200))
    yield f"{samples:,} texts with each speculator"
    found = {}
    for name, fit in fits(counts, os.cpu_count() or 1):
        yield f"law of {name}"
        found[name] = fit
    return {
        "law_of_the_least_fitting_speculator": Quantity(
            min(found[name] for name in SPECULATORS), "", samples=samples
        ),
        "law_of_the_best_fitting_mistake": Quantity(
            max(found[name] for name in MISTAKES), "", samples=counts[next(iter(MISTAKES))]
        ),
        **{
            f"law_{name.replace('-', '_')}": Quantity(fit, "", samples=counts[name])
            for name, fit in found.items()
        },
    }


def _measure(run: Run) -> Measurements:
    from plait.claims.drafts import answer, with_draft
    from plait.claims.prompts import chat_prompts, copying_prompts
    from plait.decode import Sampling
    from plait.engine import load

    sampled = yield from _sampled_laws(run)
    yield "loading SmolLM2"
    every = yield from _every_draft(run, load("smollm2"))
    plain = load("smollm2", weights="fp32")
    drafting = with_draft(plain, "prompt-lookup:budget=off")
    kinds = {"copying": copying_prompts(plain), "chat": chat_prompts(plain)}
    kinds = run.pick(kinds, {kind: prompts[:1] for kind, prompts in kinds.items()})
    max_new_tokens = run.pick(200, 16)
    same = {"greedy": 0, "sampled": 0}
    count = 0
    per_pass: dict[str, Quantity] = {}
    for kind, prompts in kinds.items():
        tokens = passes = 0
        for number, prompt in enumerate(prompts):
            yield f"{kind}, prompt {number + 1} of {len(prompts)}"
            count += 1
            laws = {
                "greedy": Sampling(temperature=0.0),
                "sampled": Sampling(temperature=0.8, top_p=0.95, seed=run.seed + count),
            }
            for law, sampling in laws.items():
                expected = answer(plain, prompt, sampling, max_new_tokens)
                drafted = answer(drafting, prompt, sampling, max_new_tokens)
                same[law] += drafted.tokens == expected.tokens
                if law == "greedy":
                    tokens, passes = tokens + len(drafted.tokens), passes + drafted.passes
        per_pass[f"tokens_per_pass_{kind}"] = Quantity(tokens / passes, "tokens/pass", samples=passes)
    return {
        "identical_greedy": Quantity(same["greedy"] / count, "of prompts", samples=count),
        "identical_sampled": Quantity(same["sampled"] / count, "of prompts", samples=count),
        **per_pass,
        **every,
        **sampled,
    }


CLAIM = Claim(
    name="lossless-draft",
    title="Drafting is lossless",
    headline=(
        "With every draft each greedy answer is the one of plain decoding, token for token, and with prompt-lookup each "
        "seeded, sampled one too; sampled text has the model's law with every draft."
    ),
    source="Saxena 2023, Prompt Lookup Decoding; Yang et al. 2023, arXiv:2304.04487 (inference with reference)",
    scale=(
        "SmolLM2-135M-Instruct in fp32; 8 prompts that ask for copies and edits of code and 6 of everyday chat, up to "
        "200 new tokens, greedy and sampled (temperature 0.8, top-p 0.95, seeded). Tokens per pass are of the greedy "
        "answers. Every draft that needs no tuned model (those with a draft model take the model's own first 28 of 30 layers): "
        "100 paragraphs of Python's manual, 32 new tokens, greedy, in the codes of the file, alone and eight at once. Laws: "
        "200,000 texts of 3 tokens with each speculator from tables of 6 words, whose exact law is enumerated, and 20,000 with "
        "each of six planted mistakes; the probability of counts as unlikely as these (chi-square)."
    ),
    bars=tuple(
        Bar(
            quantity=f"identical_{law}",
            relation=">=",
            value=1.0,
            unit="of prompts",
            why="The verifier chooses each token as plain decoding would, with the same random number.",
        )
        for law in ("greedy", "sampled")
    )
    + tuple(
        Bar(
            quantity=f"identical_every_draft_{how}",
            relation=">=",
            value=1.0,
            unit="of answers",
            why="The verifier keeps a guess only if the model says it; logits closer than 1e-3 count as tied.",
        )
        for how in ("alone", "batch_8")
    )
    + (
        Bar(
            quantity="law_of_the_least_fitting_speculator",
            relation=">=",
            value=1e-3,
            unit="",
            why="Text drawn with a draft must have the model's law; of nine right ones one fails in 1 % of all seeds.",
        ),
        Bar(
            quantity="law_of_the_best_fitting_mistake",
            relation="<=",
            value=1e-6,
            unit="",
            why="The same test must notice what breaks the law.",
        ),
    ),
    measure=_measure,
)
