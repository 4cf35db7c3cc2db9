"""Guesses from the runners-up of earlier passes save passes, and never change a greedy answer."""

from __future__ import annotations

from plait.claims.claim import Bar, Claim, MeasurementError, Measurements, Quantity, Run

__all__ = ["CLAIM"]


def _measure(run: Run) -> Measurements:
    from plait.claims.drafts import answer, same_up_to_ties, with_draft
    from plait.claims.prompts import chat_prompts
    from plait.claims.tasks import code_prompts
    from plait.decode import Sampling
    from plait.decode.speculate.token_recycling import Table
    from plait.engine import load

    yield "loading SmolLM2"
    plain = load("smollm2", weights="fp32")
    kinds = {"code": code_prompts(plain), "chat": chat_prompts(plain)[:5]}
    kinds = run.pick(kinds, {kind: prompts[:2] for kind, prompts in kinds.items()})
    max_new_tokens = run.pick(128, 12)
    greedy = Sampling(temperature=0.0)
    quantities: dict[str, Quantity] = {}
    same, count = 0, 0
    for kind, prompts in kinds.items():
        tokens = {"cold": 0, "hot": 0}
        passes = {"cold": 0, "hot": 0}
        ratios = []
        hot, timed = with_draft(plain, "token-recycling:budget=off"), with_draft(plain, "token-recycling")
        for number, prompt in enumerate(prompts):
            yield f"{kind}, prompt {number + 1} of {len(prompts)}"
            expected = answer(plain, prompt, greedy, max_new_tokens)
            # The table of `hot` has seen the prompts before this one; that of `cold` starts empty.
            cold = with_draft(plain, "token-recycling:budget=off")
            for name, lm in (("cold", cold), ("hot", hot)):
                given = answer(lm, prompt, greedy, max_new_tokens)
                same += same_up_to_ties(plain, prompt, expected.tokens, given.tokens)
                count += 1
                tokens[name] += len(given.tokens)
                passes[name] += given.passes
            fast = answer(timed, prompt, greedy, max_new_tokens)
            again = answer(plain, prompt, greedy, max_new_tokens)
            if again.tokens != expected.tokens:
                raise MeasurementError("Plain greedy decoding gave two answers to one prompt.")
            seconds = (expected.seconds + again.seconds) / 2
            ratios.append((len(fast.tokens) - 1) / fast.seconds / ((len(expected.tokens) - 1) / seconds))
        for name in tokens:
            quantities[f"tokens_per_pass_{kind}_{name}"] = Quantity(
                tokens[name] / passes[name], "tokens/pass", samples=passes[name]
            )
        quantities[f"speed_ratio_{kind}"] = Quantity.median(ratios, "x")
    return {
        "identical_greedy": Quantity(same / count, "of answers", samples=count),
        "table_megabytes": Quantity(Table(plain.model.config.vocab_size, 8).nbytes() / 1e6, "MB"),
        **quantities,
    }


CLAIM = Claim(
    name="token-recycling",
    title="Runners-up are good guesses",
    headline=(
        "Token Recycling needs less than 2 MB beside the model and no training, and speeds up greedy decoding about "
        "twofold on every model size (Vicuna 7B to 33B on a graphics processor)."
    ),
    source="Luo et al. 2024, Turning Trash into Treasure, arXiv:2408.08696 (table 1)",
    scale=(
        "SmolLM2-135M-Instruct in fp32, greedy, up to 128 new tokens: 5 continuations of standard library code and 5 chat "
        "prompts. Tokens per pass with the paper's 80 nodes, from an empty table and from one that has seen the other "
        "prompts; speed against plain decoding with as many guesses as its times make worth it, turn by turn in one process."
    ),
    bars=(
        Bar(
            quantity="identical_greedy",
            relation=">=",
            value=1.0,
            unit="of answers",
            why="The verifier keeps a guess only if the model says it; logits closer than 1e-3 count as tied.",
        ),
        Bar(
            quantity="table_megabytes",
            relation="<=",
            value=2.0,
            unit="MB",
            why="The paper's own bound, for a vocabulary of 32,000; SmolLM2 has 49,152.",
        ),
        Bar(
            quantity="tokens_per_pass_code_cold",
            relation=">=",
            value=2.0,
            unit="tokens/pass",
            why="Code repeats its names, so the last successors of a token are often right.",
        ),
        Bar(
            quantity="tokens_per_pass_chat_cold",
            relation=">=",
            value=1.5,
            unit="tokens/pass",
            why="Free text repeats less.",
        ),
        Bar(
            quantity="speed_ratio_code",
            relation=">=",
            value=0.98,
            unit="x",
            why="A draft that makes decoding slower should not be used.",
        ),
        Bar(
            quantity="speed_ratio_chat",
            relation=">=",
            value=0.98,
            unit="x",
            why="A draft that makes decoding slower should not be used.",
        ),
    ),
    measure=_measure,
)
