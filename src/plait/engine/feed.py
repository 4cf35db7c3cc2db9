"""What one sequence contributes to a step, and what is drafted while the step runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import NamedTuple

from plait.decode.speculate import Account, Speculator, Tree
from plait.engine.sequence import RunningSequence
from plait.memory import Causal, Mask, Past
from plait.memory import Tree as TreeMask
from plait.ops import native

__all__ = ["Drafting", "Feed", "Guesser"]


class Feed(NamedTuple):
    """The rows that one sequence contributes to a step.

    `tree` is None for a piece of the prompt behind which more of the prompt follows: nothing is
    chosen. Else its scored nodes are the last rows; the rows before them are prompt. `growth` is what
    writing them allocates, in bytes.
    """

    sequence: RunningSequence
    past: Past
    tokens: list[int]
    tree: Tree | None
    growth: int = 0

    @property
    def lead(self) -> int:
        """Rows of prompt before those of the tree."""
        return len(self.tokens) - (0 if self.tree is None else self.tree.num_scored)

    @property
    def mask(self) -> Mask:
        """Causal for a run of tokens; the tree's own structure where it branches."""
        if self.tree is None or (tree := self.tree.only_scored()).is_chain:
            return Causal()
        parents = [node - 1 for node in range(self.lead)]
        parents += [self.lead - 1 if parent == -1 else self.lead + parent for parent in tree.parents]
        return TreeMask(parents)


class Guesser(NamedTuple):
    """What guesses for one sequence, and what that has brought."""

    speculator: Speculator
    account: Account


class Drafting:
    """A thread for speculators that guess on while the model checks.

    The thread computes alone, and so does the caller meanwhile where there are only two cores: then neither
    waits for the threads of the other.
    """

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None
        self.is_done = Event()

    @contextlib.contextmanager
    def beside(
        self, trees: Mapping[RunningSequence, tuple[Speculator, Tree]]
    ) -> Iterator[dict[RunningSequence, Future[Tree]]]:
        """Let speculators guess on while the block runs; wait for them at its end."""
        if not trees:
            yield {}
            return
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "plait-draft", initializer=_compute_alone)
        self.is_done = Event()
        found = {
            sequence: self._worker.submit(speculator.ahead, tree, self.is_done.is_set)
            for sequence, (speculator, tree) in trees.items()
        }
        extension = native.module()
        is_small = extension is not None and extension.threads() <= 2
        if is_small:
            native.extension().set_alone(True)
        try:
            yield found
        finally:
            if is_small:
                native.extension().set_alone(False)
            self.is_done.set()
            for future in found.values():
                future.exception()


def _compute_alone() -> None:
    if native.module() is not None:
        native.extension().set_alone(True)
