"""The side of Hugging Face Transformers, with the weights of a folder in fp32; see `protocol.py`.

Tuned as its users would: fused attention, padding on the left, no gradients, a cache. A beginning that all prompts share
is read once, and its cache is repeated for all of them, as the library's guide to caches does. Speculation `lookup` is its
`prompt_lookup_num_tokens`, `draft` its assisted generation with a draft model. It is the reference too: a task with `continuations` is answered with how far, in nats, each of their tokens is below the best one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from protocol import Clock, serve, settings

# Guesses of a prompt look-up, as in the library's guide to it.
GUESSES = 10


def main() -> None:
    given = settings()
    torch.set_num_threads(given["threads"])
    transformers.utils.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        given["folder"], dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    # Every answer is to have its full length on all sides.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    guessing: dict[str, Any] = {}
    if given.get("speculation") == "lookup":
        guessing["prompt_lookup_num_tokens"] = GUESSES
    elif given.get("speculation") == "draft":
        assistant: Any = transformers.AutoModelForCausalLM.from_pretrained(
            given["draft_folder"], dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        # Its settings are the ones that guessing is made with; the rest are those of the library.
        assistant.generation_config.eos_token_id = None
        guessing["assistant_model"] = assistant

    def answer(
        prompts: list[list[int]],
        tokens: int = 0,
        continuations: Sequence[list[int]] = (),
        shared: int = 0,
        **_: Any,
    ) -> dict[str, Any]:
        if continuations:
            return {"gaps": [gaps(model, p, c) for p, c in zip(prompts, continuations, strict=True)]}
        return generated(model, prompts, tokens, guessing, shared)

    serve(f"Transformers {transformers.__version__}, torch {torch.__version__}", answer)


class Watch(transformers.StoppingCriteria):  # type: ignore[misc]
    """Marks the time of every token of a batch."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        self.clock.step(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Stream(transformers.generation.BaseStreamer):  # type: ignore[misc]
    """Marks the time of every step of one sequence. A criterion would be asked about guesses, too."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        # The first call brings the prompt.
        self.tokens: int | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.tokens is None:
            self.tokens = 0
            return
        self.tokens += value.numel()
        self.clock.step(1, self.tokens)

    def end(self) -> None:
        pass


def generated(
    model: Any, prompts: list[list[int]], tokens: int, guessing: dict[str, Any], shared: int
) -> dict[str, Any]:
    longest = max(map(len, prompts))
    clock = Clock(len(prompts))
    watching: dict[str, Any] = (
        {"streamer": Stream(clock), **guessing}
        if len(prompts) == 1
        else {"stopping_criteria": transformers.StoppingCriteriaList([Watch(clock)])}
    )
    # Padding stands behind the shared beginning, which all rows then have at the same place.
    ids = torch.tensor(
        [prompt[:shared] + [0] * (longest - len(prompt)) + prompt[shared:] for prompt in prompts]
    )
    mask = torch.tensor(
        [[1] * shared + [0] * (longest - len(prompt)) + [1] * (len(prompt) - shared) for prompt in prompts]
    )
    with torch.inference_mode():
        if shared and len(prompts) > 1:
            cache = transformers.DynamicCache(config=model.config)
            model(ids[:1, :shared], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(len(prompts))
            watching["past_key_values"] = cache
        found = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=tokens,
            **watching,
        )
    return clock.answer(found[:, longest:].tolist())


@torch.inference_mode()
def gaps(model: Any, prompt: list[int], continuation: list[int]) -> list[float]:
    """Of every token of a continuation, how far its log-probability is below the best one's, in nats."""
    ids = torch.tensor([prompt + continuation[:-1]])
    logits = model(ids, logits_to_keep=len(continuation)).logits[0]
    chosen = logits.gather(1, torch.tensor(continuation)[:, None])[:, 0]
    found: list[float] = (logits.amax(dim=1) - chosen).tolist()
    return found


if __name__ == "__main__":
    main()
