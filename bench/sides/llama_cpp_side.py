"""The side of llama.cpp through llama-cpp-python, with its usual settings for a processor; see `protocol.py`.

16-bit keys and values, batches of 512. Prompts with a common beginning are decoded in one batch: the beginning is
read once and copied between sequences, as its own example of batched decoding does. Speculation `lookup` and `draft`
check guesses of the prompt, or of a draft model, through the C interface; `python-lookup` is that of `Llama.generate`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import llama_cpp
from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from llama_cpp_speculation import BATCH, Model, guessed, lookup, second_model
from protocol import Clock, serve, settings


def main() -> None:
    given = settings()
    threads = given["threads"]
    options: dict[str, Any] = {
        "model_path": given["model"], "n_ctx": given["context"], "n_threads": threads, "n_threads_batch": threads,
        "n_batch": BATCH, "verbose": False,
    }  # fmt: skip
    batches: dict[int, Batched] = {}
    alone: Callable[[list[int], int], dict[str, Any]]
    match given["speculation"]:
        case None:
            single = Llama(**options)
            alone = partial(plain, single)
        case "python-lookup":
            lookup_decoding = LlamaPromptLookupDecoding()
            # It guesses on behind the last token that is asked for, and keeps the logits of every row.
            options["n_ctx"] += lookup_decoding.num_pred_tokens
            single = Llama(**options, logits_all=True, draft_model=lookup_decoding)
            alone = partial(streamed, single)
        case "lookup":
            model = Model(given["model"], threads, given["context"])
            alone = partial(guessed, model, lookup())
        case _:
            model = Model(given["model"], threads, given["context"])
            draft = Model(given["draft_model"], threads, given["context"])
            alone = partial(guessed, model, second_model(draft))

    def answer(prompts: list[list[int]], tokens: int, shared: int = 0) -> dict[str, Any]:
        if len(prompts) == 1:
            return alone(prompts[0], tokens)
        if len(prompts) not in batches:
            batches[len(prompts)] = Batched(given["model"], threads, given["context"], len(prompts))
        return batches[len(prompts)].continued(prompts, tokens, shared)

    serve(f"llama-cpp-python {llama_cpp.__version__}", answer)


def plain(llama: Llama, prompt: list[int], tokens: int) -> dict[str, Any]:
    llama.reset()
    clock = Clock(1)
    llama.eval(prompt)
    chosen = [int(llama.sample(temp=0.0))]
    clock.step(1)
    while len(chosen) < tokens:
        llama.eval([chosen[-1]])
        chosen.append(int(llama.sample(temp=0.0)))
        clock.step(1)
    return clock.answer([chosen])


def streamed(llama: Llama, prompt: list[int], tokens: int) -> dict[str, Any]:
    """By the generator of llama-cpp-python, which yields the tokens of a check one by one."""
    llama.reset()
    clock = Clock(1)
    chosen = []
    for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
        chosen.append(token)
        clock.step(1, len(chosen))
        if len(chosen) == tokens:
            break
    return clock.answer([chosen])


class Batched:
    """Many sequences in one context of llama.cpp."""

    def __init__(self, model: str, threads: int, context: int, sequences: int) -> None:
        self.model = Model(model, threads, context, sequences)

    def continued(self, prompts: list[list[int]], tokens: int, shared: int) -> dict[str, Any]:
        memory = self.model.memory
        llama_cpp.llama_memory_clear(memory, True)
        clock = Clock(len(prompts))
        beginning = prompts[0][:shared]
        for start in range(0, shared, BATCH):
            piece = beginning[start : start + BATCH]
            self.model.decode([(token, start + i, 0, False) for i, token in enumerate(piece)])
        for number in range(1, len(prompts) if shared else 0):
            llama_cpp.llama_memory_seq_cp(memory, 0, number, -1, -1)
        chosen: list[list[int]] = [[] for _ in prompts]
        rows = [
            (token, shared + i, number, shared + i == len(prompt) - 1)
            for number, prompt in enumerate(prompts)
            for i, token in enumerate(prompt[shared:])
        ]
        for start in range(0, len(rows), BATCH):
            self._choose(rows[start : start + BATCH], chosen)
        clock.step(len(prompts))
        while len(chosen[0]) < tokens:
            self._choose(
                [(own[-1], len(prompt) + len(own) - 1, number, True)
                 for number, (prompt, own) in enumerate(zip(prompts, chosen, strict=True))], chosen
            )  # fmt: skip
            clock.step(len(prompts))
        return clock.answer(chosen)

    def _choose(self, rows: list[tuple[int, int, int, bool]], chosen: list[list[int]]) -> None:
        self.model.decode(rows)
        for index, (_, _, number, wanted) in enumerate(rows):
            if wanted:
                chosen[number].append(int(self.model.logits(index).argmax()))


if __name__ == "__main__":
    main()
