"""The side of llama.cpp through llama-cpp-python, with its usual settings for a processor; see `protocol.py`.

16-bit keys and values, batches of 512. Prompts with a common beginning are decoded in one batch: the beginning is
read once and copied between sequences, as its own example of batched decoding does.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import Llama
from protocol import Clock, serve, settings

BATCH = 512


def main() -> None:
    given = settings()
    threads = given["threads"]
    single = Llama(
        given["model"], n_ctx=given["context"], n_threads=threads, n_threads_batch=threads, n_batch=BATCH, verbose=False
    )  # fmt: skip
    batches: dict[int, Batched] = {}

    def answer(prompts: list[list[int]], tokens: int, shared: int = 0) -> dict[str, Any]:
        if len(prompts) == 1:
            return alone(single, prompts[0], tokens)
        if len(prompts) not in batches:
            batches[len(prompts)] = Batched(given["model"], threads, given["context"], len(prompts))
        return batches[len(prompts)].continued(prompts, tokens, shared)

    serve(f"llama-cpp-python {llama_cpp.__version__}", answer)


def alone(llama: Llama, prompt: list[int], tokens: int) -> dict[str, Any]:
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


class Batched:
    """Many sequences in one context of llama.cpp, through its C interface."""

    def __init__(self, model: str, threads: int, context: int, sequences: int) -> None:
        self.model = llama_cpp.llama_model_load_from_file(
            model.encode(), llama_cpp.llama_model_default_params()
        )
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, BATCH, BATCH
        options.n_threads = options.n_threads_batch = threads
        options.n_seq_max = sequences
        # One store for all sequences, so that a copy of a beginning shares its cells.
        options.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def continued(self, prompts: list[list[int]], tokens: int, shared: int) -> dict[str, Any]:
        memory = llama_cpp.llama_get_memory(self.context)
        llama_cpp.llama_memory_clear(memory, True)
        clock = Clock(len(prompts))
        beginning = prompts[0][:shared]
        for start in range(0, shared, BATCH):
            piece = beginning[start : start + BATCH]
            self._decode([(token, start + i, 0, False) for i, token in enumerate(piece)])
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
        self._decode(rows)
        for index, (_, _, number, wanted) in enumerate(rows):
            if wanted:
                logits = llama_cpp.llama_get_logits_ith(self.context, index)
                row = np.ctypeslib.as_array(
                    ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,)
                )
                chosen[number].append(int(row.argmax()))

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = self.batch
        batch.n_tokens = len(rows)
        for index, (token, position, number, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, number
            batch.logits[index] = wanted
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp could not decode the batch")


if __name__ == "__main__":
    main()
