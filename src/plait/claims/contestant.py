"""One side of a speed contest, in a process of its own: `python -m plait.claims.contestant SIDE THREADS`.

Reads a JSON line for each task and answers with a JSON line; see `contest.py` for the other end.
Nothing but answers goes to standard output.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

__all__ = ["Side", "decode_window"]


class Side(NamedTuple):
    """A loaded model: greedy continuations of prompts, and the bytes of its weights."""

    generate: Callable[..., list[list[int]]]
    weight_bytes: int


def _plait() -> Side:
    from functools import partial

    from plait.claims.greedy import by_plait
    from plait.engine import load
    from plait.weights import Packed

    lm = load("smollm2", offline=True)
    # The program reads every matrix once a token; what is not in a matrix is next to nothing.
    matrices = {module for module in lm.model.modules() if isinstance(module, Packed)}
    whole = matrices - {part for matrix in matrices for part in matrix.pieces() if part is not matrix}
    return Side(partial(by_plait, lm), sum(matrix.nbytes() for matrix in whole))


def _transformers() -> Side:
    from functools import partial

    from plait.claims.greedy import by_peer, load_peer
    from plait.hub import resolve

    peer = load_peer(resolve("smollm2", offline=True))
    return Side(partial(by_peer, peer), _bytes([*peer.parameters(), *peer.buffers()]))


def _bytes(tensors: Sequence[Any]) -> int:
    """Bytes of all tensors; an embedding that is the output head too counts once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def decode_window(marks: Sequence[tuple[float, Sequence[int]]]) -> tuple[float, int, int]:
    """Seconds, tokens and steps of pure decoding: after every prompt was read, until the end.

    Args:
        marks: after each step, the time in seconds and how many tokens each continuation has.
    """
    first = next(index for index, (_, counts) in enumerate(marks) if min(counts) > 0)
    (start, before), (stop, after) = marks[first], marks[-1]
    return stop - start, sum(after) - sum(before), len(marks) - 1 - first


def main(side_name: str, threads: str) -> None:
    """Load a side, say that it is ready, and answer tasks until standard input ends."""
    import torch

    torch.set_num_threads(int(threads))
    side = {"plait": _plait, "transformers": _transformers}[side_name]()
    _say({"weight_bytes": side.weight_bytes})
    for line in sys.stdin:
        _say(_timed(side, **json.loads(line)))


def _timed(side: Side, prompts: list[list[int]], max_new_tokens: int) -> dict[str, Any]:
    """One task's answer: the tokens, and how long they took."""
    marks: list[tuple[float, list[int]]] = []
    start = time.perf_counter()
    tokens = side.generate(
        prompts, max_new_tokens, lambda counts: marks.append((time.perf_counter(), counts))
    )
    seconds = time.perf_counter() - start
    decode_seconds, decode_tokens, decode_steps = decode_window(marks)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "decode_seconds": decode_seconds,
        "decode_tokens": decode_tokens,
        "decode_steps": decode_steps,
    }


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
