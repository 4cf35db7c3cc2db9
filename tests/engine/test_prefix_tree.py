"""The tree of shared strands, driven by random sequences whose keys say which token they are of."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from plait.engine.prefix_tree import Namespace, PrefixTree, common_prefix
from plait.errors import ConfigError
from plait.memory import FrozenStrand, Heads, Memory, MemoryPlan, Past

PLAN = MemoryPlan()
HEADS = Heads(num_heads=1, num_kv_heads=1, head_dim=2, scale=1.0)
GRAIN = 2
ANNA, BERT = Namespace("anna", PLAN), Namespace("bert", PLAN)


def past_of(tokens: list[int], past: Past | None = None) -> Past:
    """A past that has read tokens; each key is the token and its position, in every layer."""
    past = Past([Memory(HEADS, PLAN) for _ in range(2)]) if past is None else past
    new = range(len(past), len(tokens))
    keys = torch.tensor([[float(tokens[at]), float(at)] for at in new]).reshape(len(new), 1, 2)
    for layer in past.layers:
        assert isinstance(layer, Memory)
        layer.append(keys, keys)
    past.commit()
    return past


def contents(past: Past) -> list[list[list[float]]]:
    """The keys of every layer in the order of the sequence."""
    found = []
    for layer in past.layers:
        assert isinstance(layer, Memory)
        strands = [strand for strand in layer.all_strands() if isinstance(strand, FrozenStrand)]
        found.append([row for strand in strands for row in strand.keys[0].tolist()])
    return found


def expected(tokens: list[int]) -> list[list[list[float]]]:
    return [[[float(token), float(at)] for at, token in enumerate(tokens)]] * 2


def test_a_past_begins_with_what_another_has_stored() -> None:
    tree = PrefixTree(GRAIN)
    first = past_of([1, 2, 3, 4, 5])
    tree.insert(ANNA, [1, 2, 3, 4, 5], first)
    second = Past([Memory(HEADS, PLAN) for _ in range(2)])
    assert tree.adopt(ANNA, [1, 2, 3, 4, 9, 9], second) == 4
    past_of([1, 2, 3, 4, 9, 9], second)
    assert contents(second) == expected([1, 2, 3, 4, 9, 9])
    assert contents(first) == expected([1, 2, 3, 4, 5])
    assert first.layers[0].strands[0] is second.layers[0].strands[0]  # type: ignore[union-attr]
    tree.check_integrity()


def test_nothing_crosses_namespaces() -> None:
    tree = PrefixTree(GRAIN)
    tree.insert(ANNA, [1, 2, 3, 4], past_of([1, 2, 3, 4]))
    for other in (BERT, Namespace("anna", MemoryPlan.parse("dense:dtype=bf16"))):
        assert tree.adopt(other, [1, 2, 3, 4], Past([Memory(HEADS, PLAN) for _ in range(2)])) == 0


def test_tokens_are_compared_and_not_their_hashes() -> None:
    # -1 and -2 have the same hash in CPython, and so have tuples of them.
    assert hash((-1, -1)) == hash((-2, -2))
    tree = PrefixTree(GRAIN)
    tree.insert(ANNA, [-1, -1], past_of([-1, -1]))
    assert tree.adopt(ANNA, [-2, -2], Past([Memory(HEADS, PLAN) for _ in range(2)])) == 0


def test_a_split_gives_each_half_its_own_storage_and_readers_follow() -> None:
    tree = PrefixTree(GRAIN)
    first = past_of([1, 2, 3, 4, 5, 6])
    tree.insert(ANNA, [1, 2, 3, 4, 5, 6], first)
    before = tree.nbytes
    second = Past([Memory(HEADS, PLAN) for _ in range(2)])
    assert tree.adopt(ANNA, [1, 2, 7, 7], second) == 2
    assert contents(first) == expected([1, 2, 3, 4, 5, 6])
    assert tree.nbytes <= before
    assert first.layers[1].strands[0] is second.layers[1].strands[0]  # type: ignore[union-attr]
    tree.release(first)
    tree.check_integrity()
    # Two layers, keys and values of four tokens in fp32: the half that nobody reads any more.
    assert tree.evict() == 2 * 2 * 4 * 2 * 4
    assert tree.evict() == 0
    assert contents(second) == expected([1, 2])


def test_the_leaf_that_was_not_used_for_longest_is_evicted_first() -> None:
    tree = PrefixTree(GRAIN)
    for tokens in ([1, 1], [2, 2], [3, 3]):
        past = past_of(tokens)
        tree.insert(ANNA, tokens, past)
        tree.release(past)
    reader = Past([Memory(HEADS, PLAN) for _ in range(2)])
    tree.adopt(ANNA, [1, 1], reader)
    tree.release(reader)
    tree.evict()
    for tokens, length in (([1, 1], 2), ([2, 2], 0), ([3, 3], 2)):
        past = Past([Memory(HEADS, PLAN) for _ in range(2)])
        assert tree.adopt(ANNA, tokens, past) == length
        tree.release(past)


def test_two_that_computed_the_same_keep_one_copy() -> None:
    tree = PrefixTree(GRAIN)
    first, second = past_of([1, 2, 3, 4]), past_of([1, 2, 3, 4, 5])
    tree.insert(ANNA, [1, 2, 3, 4], first)
    bytes_of_one = tree.nbytes
    tree.insert(ANNA, [1, 2, 3, 4, 5], second)
    assert tree.nbytes == bytes_of_one
    assert first.layers[0].strands[0] is second.layers[0].strands[0]  # type: ignore[union-attr]
    assert contents(second) == expected([1, 2, 3, 4, 5])


def test_the_turns_of_a_conversation_become_few_strands() -> None:
    tree = PrefixTree(GRAIN)
    tokens: list[int] = []
    for turn in range(40):
        past = Past([Memory(HEADS, PLAN) for _ in range(2)])
        assert tree.adopt(ANNA, tokens, past) == len(tokens)
        tokens += [turn, turn, 7, 7]
        past_of(tokens, past)
        tree.insert(ANNA, tokens, past)
        assert contents(past) == expected(tokens)
        tree.release(past)
        tree.check_integrity()
    past = Past([Memory(HEADS, PLAN) for _ in range(2)])
    assert tree.adopt(ANNA, tokens, past) == 160
    assert contents(past) == expected(tokens)
    # Without joining there would be 40 of them.
    assert len(past.layers[0].all_strands()) <= 7  # type: ignore[union-attr]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 6), (4, 3)])
def test_a_run_of_tokens_that_are_not_there_is_refused(start: int, stop: int) -> None:
    layer = past_of([1, 2, 3, 4, 5]).layers[0]
    assert isinstance(layer, Memory)
    with pytest.raises(ConfigError, match="committed"):
        layer.run(start, stop)
    layer.append(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
    with pytest.raises(ConfigError, match="pending"):
        layer.run(0, 2)
    with pytest.raises(ConfigError, match="pending"):
        layer.adopt(past_of([1, 2]).layers[0].run(0, 2))  # type: ignore[union-attr]


def test_readers_follow_a_split_also_while_they_write() -> None:
    tree = PrefixTree(GRAIN)
    first = past_of([1, 2, 3, 4])
    tree.insert(ANNA, [1, 2, 3, 4], first)
    for layer in first.layers:
        layer.append(torch.full((1, 1, 2), 9.0), torch.full((1, 1, 2), 9.0))  # type: ignore[union-attr]
    tree.adopt(ANNA, [1, 2, 8], Past([Memory(HEADS, PLAN) for _ in range(2)]))
    first.truncate(4)
    past_of([1, 2, 3, 4, 5], first)
    assert contents(first) == expected([1, 2, 3, 4, 5])
    tree.check_integrity()


def test_common_prefix_equals_a_loop() -> None:
    for a, b in itertools.product(itertools.product([0, 1], repeat=5), itertools.product([0, 1], repeat=4)):
        wanted = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 4)
        assert common_prefix(a, b) == common_prefix(b, a) == wanted


class TreeMachine(RuleBasedStateMachine):
    """Sequences that read, store, end and are forgotten in any order."""

    pasts = Bundle("pasts")
    words = st.lists(st.integers(0, 2), min_size=1, max_size=12)
    names = st.sampled_from([ANNA, BERT])

    def __init__(self) -> None:
        super().__init__()
        self.tree = PrefixTree(GRAIN)
        self.live: list[tuple[list[int], Past]] = []
        self.computed: dict[Namespace, set[tuple[int, ...]]] = {ANNA: set(), BERT: set()}

    @rule(target=pasts, tokens=words, name=names)
    def begin(self, tokens: list[int], name: Namespace) -> tuple[Namespace, list[int], Past]:
        past = Past([Memory(HEADS, PLAN) for _ in range(2)])
        shared = self.tree.adopt(name, tokens, past)
        assert shared % GRAIN == 0
        assert shared == 0 or tuple(tokens[:shared]) in self.computed[name]
        assert len(past) == shared
        past_of(tokens, past)
        self.live.append((tokens, past))
        return name, tokens, past

    @rule(one=pasts, data=st.data())
    def store(self, one: tuple[Namespace, list[int], Past], data: st.DataObject) -> None:
        name, tokens, past = one
        length = data.draw(st.integers(0, len(tokens)))
        self.tree.insert(name, tokens[:length], past)
        self.computed[name].update(tuple(tokens[:end]) for end in range(length + 1))

    @rule(one=pasts, more=words)
    def read_on(self, one: tuple[Namespace, list[int], Past], more: list[int]) -> None:
        one[1].extend(more)
        past_of(one[1], one[2])

    @rule(one=consumes(pasts))
    def end(self, one: tuple[Namespace, list[int], Past]) -> None:
        self.tree.release(one[2])
        self.live = [(tokens, past) for tokens, past in self.live if past is not one[2]]

    @rule()
    def evict(self) -> None:
        before, freed = self.tree.nbytes, self.tree.evict()
        assert self.tree.nbytes == before - freed

    @invariant()
    def everything_agrees(self) -> None:
        self.tree.check_integrity()
        for tokens, past in self.live:
            assert contents(past) == expected(tokens)

    def teardown(self) -> None:
        for _, past in self.live:
            self.tree.release(past)
        while self.tree.evict():
            self.tree.check_integrity()
        assert self.tree.nbytes == 0


TreeMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
test_any_order_of_reading_storing_and_ending = TreeMachine.TestCase
