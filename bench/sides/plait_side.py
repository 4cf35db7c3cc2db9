"""Plait's side of a contest; see `protocol.py`."""

from __future__ import annotations

from typing import Any

import torch
from protocol import Clock, serve, settings

import plait


def main() -> None:
    given = settings()
    torch.set_num_threads(given["threads"])
    lm = plait.load(given["model"], memory=given["memory"], draft=given["draft"], weights=given["weights"])

    def answer(prompts: list[list[int]], tokens: int, **_: Any) -> dict[str, Any]:
        engine = lm.new_engine()
        clock = Clock(len(prompts))
        sequences = [
            engine.submit(lm.request(prompt, max_new_tokens=tokens, ignore_end=True)) for prompt in prompts
        ]
        while not engine.is_idle:
            engine.step()
            clock.step(sum(bool(sequence.choices) for sequence in sequences))
        return clock.answer([[choice.token for choice in sequence.choices] for sequence in sequences])

    serve(f"Plait {plait.__version__}", answer)


if __name__ == "__main__":
    main()
