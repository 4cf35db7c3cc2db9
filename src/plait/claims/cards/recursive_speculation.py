"""Guesses drawn without replacement are accepted more often than independent ones, and than a chain."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run

if TYPE_CHECKING:
    from numpy.random import Generator as Random

__all__ = ["CLAIM"]

_TOKENS, _DRAWS, _DISTANCE = 32, 4, 0.5

# Three levels each, so that all could emit at most four tokens for each pass.
_DRAFTS = {
    "chain": "chain:tokens=3,layers={layers}",
    "rsd_c": "rsd-c:branch=[2,2,2],layers={layers}",
    "rsd_s": "rsd-s:width=4,depth=3,layers={layers}",
}


def _acceptance(random: Random, rounds: int) -> dict[str, float]:
    """How often one of a node's draws is kept, for one random pair of laws at a fixed distance."""
    import numpy as np
    import torch

    from plait.decode.gumbel import top
    from plait.decode.speculate import Rejection

    while True:
        target, other = random.dirichlet(np.full(_TOKENS, 0.1), size=2)
        apart = np.abs(target - other).sum() / 2
        if apart >= _DISTANCE:
            break
    draft = target + (other - target) * _DISTANCE / apart
    laws = torch.from_numpy(target), torch.from_numpy(draft)
    kept = {"without": 0, "with": 0}
    for _ in range(rounds):
        draws = {
            "without": top(np.log(np.maximum(draft, 1e-300)) + random.gumbel(size=_TOKENS), _DRAWS),
            "with": random.choice(_TOKENS, _DRAWS, p=draft / draft.sum()),
        }
        for name, tokens in draws.items():
            judge = Rejection(*laws, replacement=name == "with")
            for token in tokens.tolist():
                if judge.accepts(token, random.random()):
                    kept[name] += 1
                    break
                judge.reject(token)
    return {name: count / rounds for name, count in kept.items()}


def _on_a_model(run: Run) -> Generator[str, None, dict[str, Quantity]]:
    """Tokens for each pass of SmolLM2 with each draft, and whether greedy answers stay as they are."""
    from plait.claims.drafts import answer, same_up_to_ties, with_draft
    from plait.claims.prompts import chat_prompts
    from plait.decode import Sampling
    from plait.engine import load

    yield "loading SmolLM2"
    plain = load("smollm2")
    layers = len(plain.model.config.blocks) - 2
    drafting = {name: with_draft(plain, spec.format(layers=layers)) for name, spec in _DRAFTS.items()}
    prompts = chat_prompts(plain)
    prompts = run.pick(prompts[:4], prompts[:1])
    max_new_tokens = run.pick(48, 8)
    same = 0
    tokens, passes = dict.fromkeys(_DRAFTS, 0), dict.fromkeys(_DRAFTS, 0)
    for number, prompt in enumerate(prompts):
        greedy = Sampling(temperature=0.0)
        expected = answer(plain, prompt, greedy, max_new_tokens)
        for name, lm in drafting.items():
            yield f"{name.replace('_', '-')}, prompt {number + 1} of {len(prompts)}"
            sampling = Sampling(temperature=1.0, seed=run.seed + number)
            given = answer(lm, prompt, sampling, max_new_tokens, ignore_end=True)
            tokens[name] += len(given.tokens)
            passes[name] += given.passes
            if number == 0:
                again = answer(lm, prompt, greedy, max_new_tokens)
                same += same_up_to_ties(plain, prompt, expected.tokens, again.tokens)
    quantities = {
        f"tokens_per_pass_{name}": Quantity(tokens[name] / passes[name], "tokens/pass", samples=passes[name])
        for name in _DRAFTS
    }
    chain = quantities["tokens_per_pass_chain"].value
    best = max(quantities[f"tokens_per_pass_{name}"].value for name in ("rsd_c", "rsd_s"))
    return quantities | {
        "best_tree_to_chain": Quantity(best / chain, "x"),
        "identical_greedy": Quantity(same / len(_DRAFTS), "of answers", samples=len(_DRAFTS)),
    }


def _measure(run: Run) -> Measurements:
    import numpy as np

    yield "20 pairs of laws"
    random = np.random.default_rng(run.seed)
    pairs = [_acceptance(random, run.pick(1000, 150)) for _ in range(20)]
    accepted = {name: float(np.mean([pair[name] for pair in pairs])) for name in ("without", "with")}
    model = yield from _on_a_model(run)
    return {
        "accepted_without_replacement": Quantity(accepted["without"], "of nodes", samples=len(pairs)),
        "accepted_with_replacement": Quantity(accepted["with"], "of nodes", samples=len(pairs)),
        "gain": Quantity(accepted["without"] - accepted["with"], "of nodes", samples=len(pairs)),
        **model,
    }


CLAIM = Claim(
    name="recursive-speculation",
    title="Drawing without replacement wastes no guess",
    headline=(
        "Recursive speculative decoding, with trees drawn without replacement, yields more tokens for each pass of the "
        "model than a chain and than independent draws, in the model's own law (Llama 2 and OPT on graphics processors)."
    ),
    source="Jeon et al. 2024, Recursive Speculative Decoding, arXiv:2402.14160",
    scale=(
        "20 random pairs of laws over 32 tokens at a total variation of 0.5, four draws each; SmolLM2-135M-Instruct with "
        "its own first 28 of 30 layers as the draft, temperature 1, four chat prompts of 48 new tokens, three levels deep: "
        "a chain, RSD-C with two children for each node, RSD-S with width four. Passes are counted, not timed."
    ),
    bars=(
        Bar(
            quantity="gain",
            relation=">=",
            value=0.03,
            unit="of nodes",
            why="A token that was rejected once is never offered again.",
        ),
        Bar(
            quantity="best_tree_to_chain",
            relation=">=",
            value=1.0,
            unit="x",
            why="A tree of the same depth contains more than the chain does.",
        ),
        Bar(
            quantity="identical_greedy",
            relation=">=",
            value=1.0,
            unit="of answers",
            why="The verifier keeps a guess only if the model says it; logits closer than 1e-3 count as tied.",
        ),
    ),
    measure=_measure,
)
