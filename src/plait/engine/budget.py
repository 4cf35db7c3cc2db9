"""The memory budget: which bytes belong to whom, and who gives them back when they are needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from plait.engine.prefix_tree import PrefixTree
from plait.engine.sequence import RunningSequence

__all__ = ["MemoryBudget"]


class MemoryBudget:
    """Bytes of keys, values and states: those of shared strands once, and those of each sequence.

    Args:
        limit: most bytes to keep between steps; None for no limit.
        tree: the shared strands.
    """

    def __init__(self, limit: int | None, tree: PrefixTree) -> None:
        self.limit = limit
        self.tree = tree
        self._own: dict[RunningSequence, int] = {}
        self._sum = 0

    @property
    def used(self) -> int:
        """Bytes that are kept now; those of a caller's own past may count twice where it shares them."""
        return self._sum + self.tree.nbytes

    def own(self, sequence: RunningSequence) -> int:
        """Bytes that a sequence keeps for itself, beside shared strands."""
        return self._own.get(sequence, 0)

    def update(self, sequence: RunningSequence) -> None:
        """Count again what a sequence keeps; nothing once its past is gone."""
        self._sum -= self._own.pop(sequence, 0)
        if sequence.past is not None:
            own = sequence.past.nbytes() - self.tree.shared_bytes(sequence.past)
            self._own[sequence] = own
            self._sum += own

    def release(self, sequence: RunningSequence) -> None:
        """Stop counting a sequence."""
        self._sum -= self._own.pop(sequence, 0)

    def fits(self, more: int) -> bool:
        """Whether there is room for more bytes, once strands that nobody reads are forgotten where needed."""
        if self.limit is None:
            return True
        while self.used + more > self.limit:
            if not self.tree.evict():
                return False
        return True

    def victim(
        self, sequences: Iterable[RunningSequence], keeper: RunningSequence | None
    ) -> RunningSequence | None:
        """The sequence that should give its past back: the youngest of the tenant that keeps most.

        Args:
            sequences: all that are not finished.
            keeper: the one that keeps its past, so that something always gets on; so does a caller's own.
        """
        holders = [sequence for sequence in sequences if sequence.past is not None]
        kept: Counter[str] = Counter()
        for holder in holders:
            kept[holder.tenant] += self.own(holder)
        candidates = [holder for holder in holders if holder is not keeper and not holder.is_pinned]
        return max(candidates, key=lambda holder: (kept[holder.tenant], holder.arrival), default=None)

    def check_integrity(self, sequences: Iterable[RunningSequence]) -> None:
        """Assert that what was counted is what is kept; for tests."""
        holders = {sequence for sequence in sequences if sequence.past is not None}
        assert self._own.keys() == holders
        assert self._sum == sum(self._own.values())
        for sequence, own in self._own.items():
            assert sequence.past is not None
            assert own == sequence.past.nbytes() - self.tree.shared_bytes(sequence.past) >= 0
        assert self.limit is None or self.used <= self.limit
