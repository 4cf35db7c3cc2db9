"""Tokens per second of decoding, beside Transformers on the same machine, weights and prompts."""

from __future__ import annotations

from plait.claims.claim import Bar, Claim, Measurements, Run
from plait.claims.contest import Race, decode_contest
from plait.claims.greedy import NEEDS

__all__ = ["CLAIM", "races"]

_LENGTHS = (16, 40, 90, 160, 280, 450, 700, 1000)


def races(lengths: tuple[int, ...] = _LENGTHS, max_new_tokens: int = 64) -> list[Race]:
    """Runs of Python's manual as prompts: the middle one alone, and all of them as one ragged batch."""
    from plait.claims.texts import token_runs
    from plait.engine.loading import read_text_side
    from plait.hub import resolve
    from plait.nn.checkpoints import open_checkpoint

    with open_checkpoint(resolve("smollm2")) as checkpoint:
        tokenizer, _ = read_text_side(checkpoint)
    prompts = token_runs(tokenizer, lengths)
    alone = prompts[len(prompts) // 2]
    return [Race("batch_1", [alone], max_new_tokens), Race(f"batch_{len(prompts)}", prompts, max_new_tokens)]


def _measure(run: Run) -> Measurements:
    import torch

    return (
        yield from decode_contest(
            races(max_new_tokens=run.pick(64, 4)), rounds=run.pick(5, 1), threads=torch.get_num_threads()
        )
    )


CLAIM = Claim(
    name="decode-speed",
    title="Decoding is at least as fast as Transformers",
    headline=(
        "Plait decodes one sequence at least as fast as Hugging Face Transformers, and answers a ragged batch of 8 at "
        "least 1.5 times as fast; with torch operations alone, too."
    ),
    scale=(
        "SmolLM2-135M-Instruct (GGUF Q4_1; Plait by default, and as plait_torch and Transformers dequantised to fp32), "
        "greedy, 64 new tokens; one prompt of "
        "280 tokens, and 8 prompts of 16 to 1,000, which Transformers pads on the left. Each side in its own process "
        "with the same number of threads and its default attention; turns in 5 rounds after a warm-up, medians. "
        "Decode speed is counted from when every prompt was read, total speed from the start. No speed is "
        "reported unless all texts are equal."
    ),
    bars=(
        Bar(
            quantity="batch_1_decode_ratio_plait",
            relation=">=",
            value=1.0,
            unit="x",
            why="Both read the same weights for each token, so nothing but overhead can differ.",
        ),
        Bar(
            quantity="batch_8_decode_ratio_plait",
            relation=">=",
            value=1.5,
            unit="x",
            why="A padded batch attends to padding and copies its cache; packed rows do neither.",
        ),
        Bar(
            quantity="batch_1_decode_ratio_plait_torch",
            relation=">=",
            value=1.0,
            unit="x",
            why="The same operations on the same weights in fp32: a design that slows torch down would show.",
        ),
        Bar(
            quantity="batch_8_total_ratio_plait_torch",
            relation=">=",
            value=1.5,
            unit="x",
            why="Prompts are packed too, so that what is read and answered in all takes less time.",
        ),
    ),
    measure=_measure,
    needs=NEEDS,
)
