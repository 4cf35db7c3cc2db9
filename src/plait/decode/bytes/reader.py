"""What a model says after many token sequences that begin alike, in one pass over their tree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from plait.errors import CapacityError
from plait.memory import MemoryPlan, Past, Rows
from plait.nn import Transformer
from plait.ops import Tree

__all__ = ["TokenReader", "common_length"]

Ids = tuple[int, ...]
LogLaw = npt.NDArray[np.float64]
_ROWS_AT_ONCE = 256


class TokenReader:
    """A model with the memory of the sequence that it read last.

    Args:
        model: the transformer.
        plan: how the past is kept; it must let tokens be taken back.

    Attributes:
        tokens_read: tokens that went through the model so far.
        passes: forward passes so far.
    """

    def __init__(self, model: Transformer, plan: MemoryPlan) -> None:
        self.model = model
        self.past: Past = model.new_past(plan)
        self.ids: list[int] = []
        self.tokens_read = 0
        self.passes = 0

    def fork(self) -> TokenReader:
        """A second reader that shares what was read; reading with one does not change the other."""
        twin = TokenReader.__new__(TokenReader)
        twin.model, twin.past, twin.ids = self.model, self.past.fork(), list(self.ids)
        twin.tokens_read, twin.passes = self.tokens_read, self.passes
        return twin

    @torch.inference_mode()
    def read(self, main: Ids, wanted: Iterable[Ids]) -> Iterator[tuple[Ids, LogLaw]]:
        """The law of the next token after each of some sequences, as it is read.

        Args:
            main: the sequence that stays in memory, with tokens that start a text.
            wanted: sequences that begin with the same token as `main`.

        Yields:
            Each wanted sequence with its log-law, (V,) float64 in nats.

        Raises:
            CapacityError: a sequence fills the model's context.
            ConfigError: the memory cannot take tokens back that far.
        """
        goals = set(wanted)
        if not goals:
            return
        longest = max(map(len, goals))
        if longest >= self.model.config.max_positions:
            raise CapacityError(
                f"The text has {longest} tokens; the model's context is {self.model.config.max_positions}, what follows "
                "included. Shorten it."
            )
        shared = common_length([main, *goals])
        known = min(common_length([tuple(self.ids), main[: shared - 1]]), min(map(len, goals)) - 1)
        if known < len(self.ids):
            self.past.truncate(known)
            del self.ids[known:]
        # What all sequences share is a chain; only the rest is a tree, whose root is the last shared token.
        while len(self.ids) < shared - 1:
            chunk = main[len(self.ids) : min(shared - 1, len(self.ids) + _ROWS_AT_ONCE)]
            yield from self._pass(chunk, list(range(-1, len(chunk) - 1)), goals, range(len(chunk)))
        start = len(self.ids)
        nodes: dict[Ids, int] = {}
        tokens: list[int] = []
        parents: list[int] = []
        for sequence in [main, *sorted(goals)]:
            for stop in range(start + 1, len(sequence) + 1):
                node = sequence[:stop]
                if node not in nodes:
                    nodes[node] = len(tokens)
                    tokens.append(node[-1])
                    parents.append(nodes[node[:-1]] if stop > start + 1 else -1)
        path = [nodes[main[:stop]] for stop in range(start + 1, len(main) + 1)]
        yield from self._pass(tokens, parents, goals, path)

    def _pass(
        self, tokens: Sequence[int], parents: list[int], goals: set[Ids], path: Sequence[int]
    ) -> Iterator[tuple[Ids, LogLaw]]:
        """Read a tree behind the past, keep one path of it, and tell the laws of its nodes that are wanted."""
        names: list[Ids] = []
        for token, parent in zip(tokens, parents, strict=True):
            names.append((*(names[parent] if parent >= 0 else self.ids), token))
        is_chain = all(parent == node - 1 for node, parent in enumerate(parents))
        segment = (len(tokens), len(self.past))
        rows = Rows([segment if is_chain else (*segment, Tree(parents))])
        asked = [node for node, name in enumerate(names) if name in goals]
        ids = torch.tensor(list(tokens), dtype=torch.int64)
        hidden = self.model(ids, rows, [self.past])
        self.past.commit(None if list(path) == list(range(len(tokens))) else list(path))
        self.ids = list(names[path[-1]])
        self.tokens_read += len(tokens)
        self.passes += 1
        for node in asked:
            logits = self.model.logits(hidden[node : node + 1])[0].cpu().double()
            yield names[node], logits.log_softmax(dim=-1).numpy()


def common_length(sequences: Sequence[Ids]) -> int:
    """How many tokens all sequences begin with."""
    low, high = min(sequences), max(sequences)
    count = 0
    for left, right in zip(low, high, strict=False):
        if left != right:
            break
        count += 1
    return count
