"""Guessing ahead never changes an answer, and copies cost fewer forward passes."""

from __future__ import annotations

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run

__all__ = ["CLAIM"]


def _measure(run: Run) -> Measurements:
    from plait.claims.drafts import answer, with_draft
    from plait.claims.prompts import chat_prompts, copying_prompts
    from plait.decode import Sampling
    from plait.engine import load

    yield "loading SmolLM2"
    plain = load("smollm2", weights="fp32")
    drafting = with_draft(plain, "prompt-lookup")
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
    }


CLAIM = Claim(
    name="lossless-draft",
    title="Drafting is lossless",
    headline=(
        "With draft='prompt-lookup' every greedy and every seeded, sampled answer is the one of plain decoding, "
        "token for token."
    ),
    source="Saxena 2023, Prompt Lookup Decoding; Yang et al. 2023, arXiv:2304.04487 (inference with reference)",
    scale=(
        "SmolLM2-135M-Instruct in fp32; 8 prompts that ask for copies and edits of code and 6 of everyday chat, up to "
        "200 new tokens, greedy and sampled (temperature 0.8, top-p 0.95, seeded). Tokens per pass are of the greedy "
        "answers."
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
    ),
    measure=_measure,
)
