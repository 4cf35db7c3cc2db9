"""A memory under any sequence of calls answers like a plain list of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from memory_methods import at_most, both, first_and_last, in_the_cache
from memory_oracle import (
    GROUPED,
    TOLERANCE,
    Distance,
    Sees,
    TokenTable,
    assert_equal_to,
    everything,
    ids_of,
    new_memory,
    paths_of,
    random_tree,
    refusal,
    storage_bound,
    within,
)

from plait.errors import ConfigError
from plait.memory import Memory, Tree
from plait.memory.policies import window as window_policy

TABLE = TokenTable(GROUPED)
SLACK = 6


@dataclass
class Twin:
    """A memory and the list of tokens that it should hold."""

    memory: Memory
    tokens: list[int] = field(default_factory=list)
    pending: int = 0
    tree: Tree | None = None
    # The most tokens at which something may have been dropped.
    longest: int = 0


class Machine(RuleBasedStateMachine):
    """Up to four memories that were forked from one; rules act on any of them."""

    spec = "full"
    table = TABLE
    tolerance = TOLERANCE
    window: int | None = None
    sees: Sees = staticmethod(everything)
    distance: Distance | None = None
    sinks = 10**9
    # What the error says where tokens cannot be taken back; `{}` stands for how many are to be left.
    refused = "Cannot go back to {} tokens"

    @initialize()
    def begin(self) -> None:
        self.twins = [Twin(new_memory(spec=self.spec, window=self.window))]
        self.seed = 0

    def pick(self, index: int) -> Twin:
        return self.twins[index % len(self.twins)]

    def answer(self, past: list[int], new: list[int], parents: Sequence[int] | None = None) -> torch.Tensor:
        return self.table.answer(past, new, parents=parents, sees=self.sees, distance=self.distance)

    def new_ids(self, length: int) -> list[int]:
        self.seed += 1
        return ids_of(length, self.seed)

    @rule(index=st.integers(0, 3), length=st.integers(0, 12))
    def append(self, index: int, length: int) -> None:
        twin = self.pick(index)
        new = self.new_ids(length)
        if twin.tree is not None:
            with pytest.raises(ConfigError, match="draft tree must be the only"):
                twin.memory.attend(*self.table.rows(new))
            return
        given = twin.memory.attend(*self.table.rows(new))
        if new:
            assert_equal_to(given, self.answer(twin.tokens, new), self.tolerance)
        twin.tokens += new
        twin.pending += length

    @rule(index=st.integers(0, 3), size=st.integers(1, 7))
    def draft(self, index: int, size: int) -> None:
        twin = self.pick(index)
        new = self.new_ids(size)
        tree = random_tree(size, torch.Generator().manual_seed(self.seed))
        if twin.pending:
            with pytest.raises(ConfigError, match="draft tree must be the only"):
                twin.memory.attend(*self.table.rows(new), mask=tree)
            return
        given = twin.memory.attend(*self.table.rows(new), mask=tree)
        assert_equal_to(given, self.answer(twin.tokens, new, tree.parents), self.tolerance)
        twin.tokens += new
        twin.pending, twin.tree = size, tree

    @rule(index=st.integers(0, 3), choice=st.integers(0, 100))
    def commit(self, index: int, choice: int) -> None:
        twin = self.pick(index)
        committed = len(twin.tokens) - twin.pending
        if twin.tree is None:
            path = list(range(choice % (twin.pending + 1)))
        else:
            paths = [[], *paths_of(twin.tree)]
            path = paths[choice % len(paths)]
        twin.memory.commit(path)
        twin.tokens[committed:] = [twin.tokens[committed + row] for row in path]
        self.is_committed(twin)

    @rule(index=st.integers(0, 3))
    def commit_all(self, index: int) -> None:
        twin = self.pick(index)
        if twin.tree is not None and list(twin.tree.parents) != list(range(-1, twin.pending - 1)):
            with pytest.raises(ConfigError, match="follow each other"):
                twin.memory.commit()
            return
        twin.memory.commit()
        self.is_committed(twin)

    @rule(index=st.integers(0, 3), back=st.integers(0, 25))
    def truncate(self, index: int, back: int) -> None:
        twin = self.pick(index)
        length = max(0, len(twin.tokens) - back)
        committed = len(twin.tokens) - twin.pending
        if twin.tree is not None and committed < length < len(twin.tokens):
            with pytest.raises(ConfigError, match="Cannot cut a draft tree"):
                twin.memory.truncate(length)
            return
        message = refusal(twin.memory, length)
        if message is not None:
            assert self.refused.format(length) in message
            assert self.sinks < length < twin.longest - SLACK
            return
        del twin.tokens[length:]
        twin.pending = max(0, length - committed)
        if not twin.pending:
            twin.tree = None

    @rule(index=st.integers(0, 3))
    def fork(self, index: int) -> None:
        twin = self.pick(index)
        if twin.tree is not None:
            return
        child = Twin(twin.memory.fork(), list(twin.tokens))
        self.is_committed(twin)
        self.is_committed(child)
        child.longest = twin.longest
        self.twins = [*self.twins, child][-4:]

    def is_committed(self, twin: Twin) -> None:
        twin.pending, twin.tree = 0, None
        twin.longest = max(twin.longest, len(twin.tokens))

    @invariant()
    def every_memory_answers_like_its_list(self) -> None:
        for twin in self.twins:
            assert len(twin.memory) == len(twin.tokens)
            assert twin.memory.pending == twin.pending
            if twin.tree is None:
                probe = self.table.rows([3])
                assert_equal_to(twin.memory.attend(*probe), self.answer(twin.tokens, [3]), self.tolerance)
                twin.memory.truncate(len(twin.tokens))

    @invariant()
    def strands_lie_in_order(self) -> None:
        for twin in self.twins:
            end = 0
            for strand in twin.memory.all_strands():
                assert strand.position >= end
                end = strand.position + len(strand)
            assert end == len(twin.tokens)
            assert twin.memory.strands.count(twin.memory.tail) == 0


class WindowedMachine(Machine):
    """The same under a policy that drops tokens."""

    spec = "window:size=9,sinks=3"
    sees = staticmethod(first_and_last(9, 3))
    sinks = 3


class NarrowMachine(WindowedMachine):
    """The same in a layer whose own window is narrower."""

    window = 6
    sees = staticmethod(both(first_and_last(9, 3), within(6)))


class LimitedMachine(Machine):
    """The same under a policy that drops tokens and limits distances."""

    spec = "lm-infinite:local=9,initial=3"
    sees = staticmethod(first_and_last(9, 3))
    distance = staticmethod(at_most(9))
    sinks = 0


class StreamingMachine(WindowedMachine):
    """The same with positions inside the cache."""

    spec = "lm-infinite:local=9,initial=3,style=streaming"
    distance = staticmethod(in_the_cache(9, 3))


class CodedMachine(Machine):
    """The same under codecs that lose next to nothing here: dead channels, and repairs of full rank."""

    spec = "think:ratio=0.25,recent=3,chunk=4,gear:group=4,buffer=4,rank=6,rank_decode=6"
    table = TokenTable(GROUPED, dead=(3, 7))
    tolerance = storage_bound(table, 2**-11)


class CodedWindowMachine(CodedMachine):
    """The same under a policy that splits and drops what is stored."""

    spec = f"window:size=9,sinks=3,{CodedMachine.spec}"
    sees = staticmethod(first_and_last(9, 3))
    sinks = 3


class EvictedMachine(Machine):
    """The same under a codec that drops tokens, of those to which nobody attends."""

    spec = "snapkv:capacity=40,window=6,kernel=1,chunk=3,sinks=2,think:ratio=0.25,window=3"
    table = TokenTable(GROUPED, dead=(3, 7), quiet=True)
    # What is dropped stands before the window at the time of a choice.
    sinks = 2
    refused = "at {}: snapkv has dropped some of them"


@pytest.mark.parametrize(
    "machine",
    [
        Machine,
        WindowedMachine,
        NarrowMachine,
        LimitedMachine,
        StreamingMachine,
        CodedMachine,
        CodedWindowMachine,
        EvictedMachine,
    ],
)
def test_any_sequence_of_calls(machine: type[Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_policy, "_SLACK", SLACK)
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(deadline=None, max_examples=25, stateful_step_count=30, derandomize=True),
    )
