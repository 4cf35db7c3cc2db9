"""Who gets a place and who gets rows: equal shares for tenants, order of arrival within one.

Each tenant with unfinished requests has an account of the rows it was given, and whoever was given the
fewest comes first. A tenant that arrives starts level with the least served, so nobody saves up a claim.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator

from plait.engine.sequence import RunningSequence

__all__ = ["Scheduler"]


class Scheduler:
    """The requests of an engine, waiting and running.

    Args:
        max_sequences: most sequences that run at the same time.
    """

    def __init__(self, max_sequences: int) -> None:
        self.max_sequences = max_sequences
        self.running: list[RunningSequence] = []
        self._waiting: dict[str, list[RunningSequence]] = {}
        self._served: dict[str, int] = {}
        self._unfinished: Counter[str] = Counter()
        self._arrivals = 0

    def __len__(self) -> int:
        """Requests that are not finished."""
        return self.num_waiting + len(self.running)

    @property
    def num_waiting(self) -> int:
        """Requests that have no place yet, or lost it for a while."""
        return sum(map(len, self._waiting.values()))

    @property
    def everyone(self) -> Iterator[RunningSequence]:
        """Every sequence that is not finished."""
        yield from self.running
        for queue in self._waiting.values():
            yield from queue

    @property
    def oldest(self) -> RunningSequence | None:
        """The running sequence that was submitted first."""
        return min(self.running, key=lambda sequence: sequence.arrival, default=None)

    def add(self, sequence: RunningSequence) -> None:
        """Let a new sequence wait for a place."""
        self._arrivals += 1
        sequence.arrival = self._arrivals
        if sequence.tenant not in self._served:
            self._served[sequence.tenant] = min(self._served.values(), default=0)
        self._unfinished[sequence.tenant] += 1
        self._wait(sequence)

    def remove(self, sequence: RunningSequence) -> None:
        """Forget a sequence that is finished, wherever it is."""
        tenant = sequence.tenant
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self._waiting.get(tenant, []):
            self._stop_waiting(sequence)
        else:
            return
        self._unfinished[tenant] -= 1
        if not self._unfinished[tenant]:
            del self._unfinished[tenant], self._served[tenant]

    def next_waiting(self) -> RunningSequence | None:
        """The one that gets the next place; it keeps its turn until it gets one.

        None where nobody waits, or all places are taken and no tenant holds one beyond its share.
        """
        heads = [queue[0] for queue in self._waiting.values()]
        if len(self.running) >= self.max_sequences:
            heads = [head for head in heads if self._beyond_share(head.tenant) is not None]
        return min(heads, key=lambda head: (self._served[head.tenant], head.arrival), default=None)

    def place(self, sequence: RunningSequence) -> None:
        """Give `next_waiting` a place; where all are taken, one that a tenant holds beyond its share."""
        if len(self.running) >= self.max_sequences and (other := self._beyond_share(sequence.tenant)):
            self.set_aside(other)
        self._stop_waiting(sequence)
        self.running.append(sequence)

    def set_aside(self, sequence: RunningSequence) -> None:
        """Take the place of a running sequence; it waits again, before those that came after it."""
        self.running.remove(sequence)
        self._wait(sequence)

    def in_order(self) -> list[RunningSequence]:
        """The running sequences in the order in which they get rows: those first that only need one."""
        return sorted(self.running, key=lambda s: (s.is_reading, self._served[s.tenant], s.arrival))

    def charge(self, sequence: RunningSequence, rows: int) -> None:
        """Note that a sequence was given rows."""
        self._served[sequence.tenant] += rows

    def check_integrity(self) -> None:
        """Assert that every sequence is in one place and every tenant has an account; for tests."""
        everyone = list(self.everyone)
        assert len(set(everyone)) == len(everyone) == len(self)
        assert len(self.running) <= self.max_sequences
        assert not any(sequence.is_finished for sequence in everyone)
        assert self._served.keys() == self._unfinished.keys()
        assert self._unfinished == Counter(sequence.tenant for sequence in everyone)
        for tenant, queue in self._waiting.items():
            assert queue, f"an empty queue is kept for {tenant!r}"
            assert queue == sorted(queue, key=lambda sequence: sequence.arrival)

    def _wait(self, sequence: RunningSequence) -> None:
        insort(self._waiting.setdefault(sequence.tenant, []), sequence, key=lambda other: other.arrival)

    def _stop_waiting(self, sequence: RunningSequence) -> None:
        queue = self._waiting[sequence.tenant]
        queue.remove(sequence)
        if not queue:
            del self._waiting[sequence.tenant]

    def _beyond_share(self, tenant: str) -> RunningSequence | None:
        """The youngest running sequence of the tenant with most places, if it has more than its share."""
        share = max(1, self.max_sequences // len(self._served))
        places = Counter(sequence.tenant for sequence in self.running)
        if not places or places[tenant] >= share:
            return None
        largest, count = places.most_common(1)[0]
        if count <= share:
            return None
        return max((s for s in self.running if s.tenant == largest), key=lambda s: s.arrival)
