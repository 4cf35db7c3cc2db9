"""Whatever a policy or an arrangement asks of visits, a native program gives what the modules give, and the same bits
alone, in a batch, in chunks and on a branch of a draft."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from native_support import extension, running, switched_off
from test_lowered import SAME_MATRICES, distance, model, new_past
from torch import Tensor

from plait.memory import Memory, Past, Policy, Rows, Segment, Visit
from plait.memory.arrangements import ParallelGroup
from plait.nn.distance_bias import DistanceBiasConfig, Harmonic, Linear
from plait.nn.lowered import Lowered, lower
from plait.nn.transformer import Transformer
from plait.ops import Causal, Far, Tree

pytestmark = switched_off

PIECES = [(0, 24), (24, 29), (29, 61), *((at, at + 1) for at in range(61, 90))]
DRAWN = [
    "prflash:block=8",
    "prflash:block=8,sink_blocks=0,near=2",
    "prflash:block=8,mode=bernoulli,correct=true",
    "prflash:block=8,mode=bernoulli,correct=true,gear:bits=8,group=16,buffer=16",
    "lm-infinite:local=16,initial=5,style=streaming",
    "lm-infinite:local=30,initial=5,style=streaming,gear:bits=8,group=16,buffer=16",
]


def tolerance(memory: str) -> float:
    """Rows that differ by rounding may be stored as codes of 8 bits that differ by one."""
    return 3 * SAME_MATRICES if "gear" in memory else SAME_MATRICES


def answer(program: Lowered, tokens: Tensor, rows: Rows, pasts: Sequence[Past]) -> Tensor:
    found = program(tokens, rows, pasts)
    assert found is not None
    return found[0].clone()


@pytest.mark.parametrize("memory", DRAWN)
@pytest.mark.parametrize("kind", ["plain", "rich"])
@torch.inference_mode()
def test_what_policies_see_in_parts_equals_the_modules(kind: str, memory: str) -> None:
    fast = model(kind)
    program = Lowered(fast)
    tokens = torch.randint(0, 101, (90,))
    mine, theirs = new_past(fast, memory), new_past(fast, memory)
    for start, stop in PIECES:
        rows = Rows([(stop - start, start)])
        found = answer(program, tokens[start:stop], rows, [mine])
        assert distance(found, fast(tokens[start:stop], rows, [theirs])) <= tolerance(memory)
        mine.commit()
        theirs.commit()


@pytest.mark.parametrize("memory", DRAWN)
@torch.inference_mode()
def test_what_policies_see_in_parts_has_the_same_bits_in_any_chunks_and_batch(memory: str) -> None:
    if "gear" in memory:
        memory = memory.replace("gear:bits=8,group=16,buffer=16", "dense:dtype=fp16")
    fast = model()
    program = Lowered(fast)
    generator = torch.Generator().manual_seed(4)
    texts = [torch.randint(0, 101, (300,), generator=generator) for _ in range(3)]
    alone = [answer(program, text, Rows([(300, 0)]), [new_past(fast, memory)]) for text in texts]

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    sets = extension().isas()
    for trial in range(4):
        pasts, done = [new_past(fast, memory) for _ in texts], [0, 0, 0]
        while min(done) < 300:
            active = [i for i in range(3) if done[i] < 300]
            counts = [min(pick(1, [3, 90][pick(0, 2)]), 300 - done[i]) for i in active]
            rows = Rows([(count, done[i]) for i, count in zip(active, counts, strict=True)])
            fed = torch.cat([texts[i][done[i] : done[i] + n] for i, n in zip(active, counts, strict=True)])
            with running(threads=1 + trial % 3, isa=sets[trial % min(3, len(sets))]):
                found = answer(program, fed, rows, [pasts[i] for i in active])
            for i, segment in zip(active, rows.segments, strict=True):
                assert torch.equal(found[segment.rows], alone[i][done[i] : done[i] + segment.length])
                pasts[i].commit()
                done[i] += segment.length
                if pick(0, 6) == 0 and "infinite" not in memory:
                    pasts[i] = pasts[i].fork()


@pytest.mark.parametrize("memory", DRAWN[:3])
@torch.inference_mode()
def test_branches_that_see_parts_of_the_past_have_the_bits_of_plain_decoding(memory: str) -> None:
    fast = model()
    program = Lowered(fast)
    text = torch.randint(0, 101, (70,))
    path = [5, 6, 7, 8, 9, 10]
    whole = answer(program, torch.cat([text, torch.tensor(path)]), Rows([(76, 0)]), [new_past(fast, memory)])
    past = new_past(fast, memory)
    answer(program, text, Rows([(70, 0)]), [past])
    past.commit()
    # The true path is every other node, and crosses a border of blocks.
    tree = Tree([-1, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8])
    fed = torch.tensor([5, 1, 6, 1, 7, 1, 8, 1, 9, 1, 10])
    found = answer(program, fed, Rows([(11, 70, tree)]), [past])
    assert torch.equal(found[::2], whole[70:])
    plain = new_past(fast, memory)
    fast(text, Rows([(70, 0)]), [plain])
    plain.commit()
    assert distance(found, fast(fed, Rows([(11, 70, tree)]), [plain])) <= tolerance(memory)


@torch.inference_mode()
def test_a_first_piece_longer_than_the_window_is_read_by_the_program() -> None:
    fast = model()
    assert lower(fast)
    program, tokens = fast.program, torch.randint(0, 101, (60,))
    memory = "lm-infinite:local=16,initial=5"
    left = []

    def watched(*arguments: Any, **settings: Any) -> Any:
        assert program is not None
        found = program(*arguments, **settings)
        left.append(found is None)
        return found

    fast.program = watched
    found = fast(tokens, Rows([(60, 0)]), [new_past(fast, memory)])
    assert left == [False, False]
    past = new_past(fast, memory)
    for at in range(60):
        assert torch.equal(fast(tokens[at : at + 1], Rows([(1, at)]), [past])[0], found[at])
        past.commit()
    fast.program = None
    assert distance(found, fast(tokens, Rows([(60, 0)]), [new_past(fast, memory)])) <= SAME_MATRICES


@dataclass(frozen=True, kw_only=True)
class Asked(Policy):
    """Visits that a test made."""

    make: Callable[[Memory, Segment], list[Visit]]

    def __post_init__(self) -> None:
        pass

    def visits(self, memory: Memory, segment: Segment) -> list[Visit]:
        return self.make(memory, segment)


def anything(memory: Memory, segment: Segment) -> list[Visit]:
    """Every strand in random pieces, each seen by a run of queries, with some weight, mask, window and distance."""
    generator = torch.Generator().manual_seed(1000 * memory.layer + len(memory))

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    visits: list[Visit] = []
    for strand in memory.all_strands():
        at = pick(0, len(strand))
        for part in strand.split(at) if at else [strand]:
            first = pick(0, segment.length)
            queries = [None, range(first, pick(first, segment.length + 1))][pick(0, 2)]
            is_past = part.position + len(part) <= segment.position
            is_far = is_past and queries != range(first, first) and pick(0, 3) == 0
            mask = Far(segment.mask, pick(1, 5), segment.length) if is_far else None
            visits.append(
                Visit(
                    part,
                    [None, pick(2, 40)][pick(0, 2)],
                    mask,
                    pick(0, 30) if is_past and pick(0, 3) == 0 else None,
                    queries,
                    [0.0, pick(-9, 9) / 4][pick(0, 2)],
                )
            )
    return visits


@pytest.mark.parametrize("codec", ["dense", "gear:bits=8,group=16,buffer=16"])
@pytest.mark.parametrize("kind", ["plain", "rich"])
@torch.inference_mode()
def test_random_visits_equal_the_modules(kind: str, codec: str) -> None:
    fast = model(kind)
    program = Lowered(fast)
    tokens = torch.randint(0, 101, (90,))
    mine, theirs = new_past(fast, codec), new_past(fast, codec)
    for past in (mine, theirs):
        for layer in past.layers:
            layer.plan = replace(layer.plan, policy=Asked(make=anything))
    for start, stop in PIECES:
        mask: Any = Tree([-1, 0, 1, 1, 0]) if stop - start == 5 else Causal()
        rows = Rows([(stop - start, start, mask)])
        found = answer(program, tokens[start:stop], rows, [mine])
        assert distance(found, fast(tokens[start:stop], rows, [theirs])) <= tolerance(codec)
        for past in (mine, theirs):
            past.commit([0, 1, 2] if isinstance(mask, Tree) else None)
            if isinstance(mask, Tree):
                # The next piece is of as many tokens as before.
                past.truncate(start)
                fast(tokens[start:stop], Rows([(stop - start, start)]), [past])
                past.commit()


def with_contexts(fast: Transformer, codec: str, *, temperature: float, scale: float, moved: bool) -> Past:
    """A prefix and three contexts that were read apart, at the same positions."""
    prefix = torch.arange(30)
    past = new_past(fast, codec)
    fast(prefix, Rows([(30, 0)]), [past])
    past.commit()
    contexts = []
    for length in (40, 300, 7):
        own = past.fork()
        fast(torch.arange(length) % 97, Rows([(length, 30)]), [own])
        own.commit()
        contexts.append(own)
    for index, layer in enumerate(past.layers):
        assert isinstance(layer, Memory)
        for own in contexts:
            own.layers[index].freeze()
        strands = [own.layers[index].run(30, len(own)) for own in contexts]
        layer.append_strand(ParallelGroup(strands, temperature=temperature, scale=scale))
        if moved:
            # As an edit of the prefix leaves it.
            layer.strands = [strand.moved(3) for strand in layer.strands]
            layer.tail = layer._new_tail(333)
    return past


@pytest.mark.parametrize("codec", ["dense", "gear:bits=8,group=16,buffer=16"])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.6, 0.9)])
@pytest.mark.parametrize("kind", ["plain", "rich"])
@torch.inference_mode()
def test_parallel_contexts_equal_the_modules(
    kind: str, temperature: float, scale: float, moved: bool, codec: str
) -> None:
    fast = model(kind)
    program = Lowered(fast)
    made = with_contexts(fast, codec, temperature=temperature, scale=scale, moved=moved)
    mine, theirs = made, made.fork()
    at = len(made)
    tokens = torch.randint(0, 101, (40,))
    for start, stop in [(0, 20), *((i, i + 1) for i in range(20, 40))]:
        rows = Rows([(stop - start, at + start)])
        found = answer(program, tokens[start:stop], rows, [mine])
        assert distance(found, fast(tokens[start:stop], rows, [theirs])) <= tolerance(codec)
        mine.commit()
        theirs.commit()


@torch.inference_mode()
def test_parallel_contexts_have_the_same_bits_in_any_chunks_and_batch_and_are_visited_once() -> None:
    fast = model()
    program = Lowered(fast)
    made = with_contexts(fast, "dense", temperature=0.6, scale=0.9, moved=False)
    at = len(made)
    texts = [torch.randint(0, 101, (12,)) for _ in range(3)]
    alone = [answer(program, text, Rows([(12, at)]), [made.fork()]) for text in texts]
    forks = [made.fork() for _ in texts]
    saved = 0
    for start, stop in [(0, 5), (5, 6), (6, 12)]:
        rows = Rows([(stop - start, at + start) for _ in texts])
        found = answer(program, torch.cat([text[start:stop] for text in texts]), rows, forks)
        saved += program.saved_visits
        for whole, segment, fork in zip(alone, rows.segments, forks, strict=True):
            assert torch.equal(found[segment.rows], whole[start:stop])
            fork.commit()
    assert saved > 0
    twin = made.fork()
    tree = Tree([-1, 0, 0, 2])
    fed = torch.tensor([int(texts[0][0]), 3, int(texts[0][1]), int(texts[0][2])])
    assert torch.equal(answer(program, fed, Rows([(4, at, tree)]), [twin])[[0, 2, 3]], alone[0][:3])


BIASES = [Harmonic(weight=1.5), Linear(slopes="alibi", weight=0.7, limit=40)]
SEEN_WITH_BIAS = [
    "full",
    "full,gear:bits=8,group=16,buffer=16",
    "window:size=30,sinks=3",
    "lm-infinite:local=16,initial=5",
    "lm-infinite:local=16,initial=5,style=streaming",
    "infllm:local=16,initial=3,block=5,topk=2,representatives=2,execution=8",
    "infllm:local=16,initial=3,block=5,topk=2,representatives=2,execution=8,cold=file,gear:bits=8,group=16",
    "prflash:block=8,mode=bernoulli,correct=true",
]


@pytest.mark.parametrize("memory", SEEN_WITH_BIAS)
@pytest.mark.parametrize("bias", BIASES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "rich"])
@torch.inference_mode()
def test_a_bias_by_distance_equals_the_modules(kind: str, bias: DistanceBiasConfig, memory: str) -> None:
    fast = model(kind, bias=bias)
    program = Lowered(fast)
    tokens = torch.randint(0, 101, (90,))
    mine, theirs = new_past(fast, memory), new_past(fast, memory)
    for start, stop in [(at, at + 8) for at in range(0, 48, 8)] + [(at, at + 1) for at in range(48, 90)]:
        rows = Rows([(stop - start, start)])
        found = answer(program, tokens[start:stop], rows, [mine])
        assert distance(found, fast(tokens[start:stop], rows, [theirs])) <= tolerance(memory)
        mine.commit()
        theirs.commit()


@pytest.mark.parametrize("bias", BIASES, ids=str)
@torch.inference_mode()
def test_a_biased_row_has_the_same_bits_in_any_chunks_batch_and_tree(bias: DistanceBiasConfig) -> None:
    fast = model(bias=bias)
    program = Lowered(fast)
    texts = [torch.randint(0, 101, (300,)) for _ in range(2)]
    alone = [answer(program, text, Rows([(300, 0)]), [new_past(fast)]) for text in texts]
    pasts = [new_past(fast) for _ in texts]
    done = 0
    for number, count in enumerate([1, 70, 3, 100, 1, 1, 80, 2, 6, 20]):
        rows = Rows([(count, done) for _ in texts])
        sets = extension().isas()
        with running(threads=1 + number % 3, isa=sets[number % len(sets)]):
            found = answer(program, torch.cat([text[done : done + count] for text in texts]), rows, pasts)
        for whole, segment, past in zip(alone, rows.segments, pasts, strict=True):
            assert torch.equal(found[segment.rows], whole[done : done + count])
            past.commit()
        done += count
    tree = Tree([-1, 0, 0, 2, 2])
    fed = torch.tensor([int(texts[0][done]), 7, int(texts[0][done + 1]), 8, int(texts[0][done + 2])])
    plain = pasts[0].fork()
    found = answer(program, fed, Rows([(5, done, tree)]), [pasts[0]])
    assert torch.equal(found[[0, 2, 4]], alone[0][done : done + 3])
    assert distance(found, fast(fed, Rows([(5, done, tree)]), [plain])) <= SAME_MATRICES


@pytest.mark.parametrize("codec", ["dense", "gear:bits=8,group=16,buffer=16"])
@pytest.mark.parametrize("bias", BIASES, ids=str)
@torch.inference_mode()
def test_biased_parallel_contexts_and_random_visits_equal_the_modules(
    bias: DistanceBiasConfig, codec: str
) -> None:
    fast = model(bias=bias)
    program = Lowered(fast)
    made = with_contexts(fast, codec, temperature=0.6, scale=0.9, moved=True)
    apart = [new_past(fast, codec) for _ in range(2)]
    for past in apart:
        for layer in past.layers:
            layer.plan = replace(layer.plan, policy=Asked(make=anything))
    tokens = torch.randint(0, 101, (40,))
    for mine, theirs in [(made, made.fork()), (apart[0], apart[1])]:
        at = len(mine)
        for start, stop in [(0, 20), (20, 33), *((i, i + 1) for i in range(33, 40))]:
            rows = Rows([(stop - start, at + start)])
            found = answer(program, tokens[start:stop], rows, [mine])
            assert distance(found, fast(tokens[start:stop], rows, [theirs])) <= tolerance(codec)
            mine.commit()
            theirs.commit()
