"""Speculation with llama.cpp: guesses that are checked in one pass, through its C interface; see `llama_cpp_side.py`.

The wheel holds the library without the helpers of llama.cpp's own programs, so its simple speculation is written out:
guess, decode the last token and the guesses in one batch, keep what the model says too, forget the rest.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from protocol import Clock

__all__ = ["BATCH", "Model", "guessed", "lookup", "second_model"]

BATCH = 512
# As llama.cpp's programs have it: most guesses of a draft model, and how sure it must be of each among its ten best.
DRAFTED, SURE, AMONG = 16, 0.75, 10

Guess = Callable[[list[int]], list[int]]


class Model:
    """A model and one context of it, with 16-bit keys and values.

    Args:
        path: of the GGUF file.
        threads: of every pass.
        context: most tokens of all sequences.
        sequences: most of them.
    """

    def __init__(self, path: str, threads: int, context: int, sequences: int = 1) -> None:
        self.model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, BATCH, BATCH
        options.n_threads = options.n_threads_batch = threads
        options.n_seq_max = sequences
        # One store for all sequences, so that a copy of a beginning shares its cells.
        options.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Read a token at a position of a sequence for each row; True where logits are wanted."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for index, (token, position, number, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, number
            batch.logits[index] = wanted
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp could not decode the batch")

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """Of what follows a row of the last batch, (V,); valid until the next one."""
        found = llama_cpp.llama_get_logits_ith(self.context, row)
        return np.ctypeslib.as_array(ctypes.cast(found, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,))

    def read(self, tokens: Sequence[int], start: int, wanted: int = 1) -> list[int]:
        """Read tokens of the only sequence from a position on; what is likeliest behind each of the last `wanted`."""
        for low in range(0, len(tokens), BATCH):
            piece = tokens[low : low + BATCH]
            first = len(tokens) - wanted - low
            self.decode([(token, start + low + i, 0, i >= first) for i, token in enumerate(piece)])
        return [int(self.logits(row).argmax()) for row in range(len(piece) - wanted, len(piece))]

    def forget(self, length: int) -> None:
        """Keep the first tokens of the only sequence."""
        llama_cpp.llama_memory_seq_rm(self.memory, 0, length, -1)


def lookup() -> Guess:
    """The prompt look-up of llama-cpp-python, as it comes."""
    find = LlamaPromptLookupDecoding()
    return lambda text: [int(token) for token in find(np.array(text, dtype=np.intc))]


def second_model(draft: Model) -> Guess:
    """The likeliest tokens of a draft model, as long as it is sure of them."""
    held: list[int] = []

    def guess(text: list[int]) -> list[int]:
        same = next(
            (i for i, pair in enumerate(zip(held, text, strict=False)) if pair[0] != pair[1]), len(held)
        )
        # The last token is read again, because the guesses begin with what is said to it.
        read = min(same, len(text) - 1)
        draft.forget(read)
        found: list[int] = []
        for _ in range(DRAFTED):
            held[:] = [*text, *found]
            (token,) = draft.read(held[read:], read)
            read = len(held)
            best = np.partition(draft.logits(draft.batch.n_tokens - 1), -AMONG)[-AMONG:]
            if 1 / np.exp(best - best.max()).sum() < SURE:
                break
            found.append(token)
        return found

    return guess


def guessed(model: Model, guess: Guess, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Continue a prompt greedily by tokens that were guessed and checked."""
    model.forget(0)
    clock = Clock(1)
    chosen = model.read(prompt, 0)
    clock.step(1, 1)
    while len(chosen) < tokens:
        text = prompt + chosen
        guesses = guess(text)[: tokens - len(chosen) - 1]
        said = model.read([text[-1], *guesses], len(text) - 1, len(guesses) + 1)
        hits = next((i for i, token in enumerate(guesses) if token != said[i]), len(guesses))
        chosen += said[: hits + 1]
        model.forget(len(text) + hits)
        clock.step(1, len(chosen))
    return clock.answer([chosen])
