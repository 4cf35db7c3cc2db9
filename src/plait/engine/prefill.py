"""Reading many sequences in few forward passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from plait.memory import Past, Rows
from plait.memory.arrangements import pack
from plait.nn import Transformer

__all__ = ["ROWS_PER_PASS", "read_packed"]

# Rows of one forward pass where the caller does not say: enough to keep the processor busy, and few
# enough that activations stay small beside the weights.
ROWS_PER_PASS = 2048


@torch.inference_mode()
def read_packed(
    model: Transformer,
    tokens: Sequence[Sequence[int]],
    pasts: Sequence[Past],
    *,
    rows_per_pass: int = ROWS_PER_PASS,
    is_prompt: bool = False,
) -> None:
    """Feed each past the tokens that it does not hold yet, as many sequences in one pass as there is room.

    Args:
        tokens: of each sequence, those that its past holds included.
        pasts: one for each sequence. After a failure some hold less than others; start anew then.
        rows_per_pass: most rows of one pass; a longer sequence takes several.
        is_prompt: more of every sequence follows; see `plait.memory.Past.commit`.
    """
    waiting = [
        index for index, (ids, past) in enumerate(zip(tokens, pasts, strict=True)) if len(past) < len(ids)
    ]
    while waiting:
        lengths = [min(len(tokens[index]) - len(pasts[index]), rows_per_pass) for index in waiting]
        for bin in pack(lengths, rows_per_pass):
            chosen = [waiting[place] for place in bin]
            starts = [len(pasts[index]) for index in chosen]
            stops = [start + lengths[place] for start, place in zip(starts, bin, strict=True)]
            spans = list(zip(chosen, starts, stops, strict=True))
            ids = [token for index, start, stop in spans for token in tokens[index][start:stop]]
            rows = Rows([(stop - start, start) for _, start, stop in spans])
            model(torch.tensor(ids, dtype=torch.int64), rows, [pasts[index] for index in chosen])
            for index, _, stop in spans:
                pasts[index].commit(is_prompt=is_prompt or stop < len(tokens[index]))
        waiting = [index for index in waiting if len(pasts[index]) < len(tokens[index])]
