"""Plait's side of a contest; see `protocol.py`."""

from __future__ import annotations

from typing import Any

import torch
from protocol import Clock, serve, settings

import plait
from plait.decode.speculate import SPECULATORS


def main() -> None:
    given = settings()
    torch.set_num_threads(given["threads"])
    draft = given["speculation"] or given["draft"]
    lm = plait.load(
        given["model"],
        memory=given["memory"],
        draft=draft,
        draft_model=given["draft_model"] if SPECULATORS.parse(draft).wants_draft_model else None,
        weights=given["weights"],
    )

    def answer(prompts: list[list[int]], tokens: int, **_: Any) -> dict[str, Any]:
        engine = lm.new_engine()
        clock = Clock(len(prompts))
        sequences = [
            engine.submit(lm.request(prompt, max_new_tokens=tokens, ignore_end=True)) for prompt in prompts
        ]
        while not engine.is_idle:
            engine.step()
            counts = [len(sequence.choices) for sequence in sequences]
            clock.step(sum(map(bool, counts)), sum(counts))
        return clock.answer([[choice.token for choice in sequence.choices] for sequence in sequences])

    serve(f"Plait {plait.__version__}", answer)


if __name__ == "__main__":
    main()
