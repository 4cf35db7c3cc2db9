"""What a memory must answer, from a list of tokens and float64 attention over all of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from plait.errors import ConfigError
from plait.memory import Heads, Memory, MemoryPlan, Tree
from plait.ops import DistanceBias, Rope

# fp32 sums of up to a few hundred products of numbers near 1.
TOLERANCE = 1e-5

# Which keys a query sees, from their positions; the order of time is added by the oracle.
Sees = Callable[[int, int], bool]
# At which distance a query sees a key, from their positions.
Distance = Callable[[int, int], int]


def frequencies(dim: int) -> Tensor:
    """Turning speeds of `dim` rotated channels."""
    return 1.0 / (10000.0 ** (torch.arange(0, dim, 2) / dim))


SLOPES = torch.tensor([1.5, 0.5, 0.25, 0.06])
LAYERS = {
    "grouped": Heads(4, 2, 8, scale=8**-0.5, rope=Rope(frequencies(8))),
    "no-positions": Heads(3, 3, 4, scale=0.5),
    "all-at-once": Heads(6, 2, 10, scale=0.4, softcap=3.0, rope=Rope(frequencies(6)), value_dim=7),
    "harmonic": Heads(
        4, 2, 8, scale=8**-0.5, rope=Rope(frequencies(8)), bias=DistanceBias(SLOPES, "harmonic", limit=30)
    ),
    "alibi": Heads(4, 4, 8, scale=0.5, bias=DistanceBias(SLOPES, "linear")),
}
GROUPED = LAYERS["grouped"]


def everything(query: int, key: int) -> bool:
    """A past without limits."""
    return True


def within(window: int | None) -> Sees:
    """A sliding window of positions, the query's own included."""
    return lambda query, key: window is None or query - key < window


class TokenTable:
    """Fixed queries, keys and values for token ids, so that a list of ids describes a whole past.

    Args:
        heads: the layer's geometry.
        seed: of the random numbers.
        dead: channels in which every key is 0.
        quiet: whether queries pay next to no attention to all but every fourth id, wherever it stands within some
            hundred positions: less than 1e-12 of what they pay to one of the others.
    """

    SIZE = 64

    def __init__(self, heads: Heads, seed: int = 0, dead: Sequence[int] = (), *, quiet: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.heads = heads
        self.q = torch.randn(self.SIZE, heads.num_heads, heads.head_dim, generator=generator)
        self.k = torch.randn(self.SIZE, heads.num_kv_heads, heads.head_dim, generator=generator)
        self.k[..., list(dead)] = 0.0
        if quiet:
            # A pair of channels that turns by 0.01 a position.
            pair = [2, 6]
            assert heads.rope is not None
            assert float(heads.rope.frequencies[2]) == pytest.approx(0.01)
            self.q[..., pair] = torch.tensor([2.0, 0.0])
            loud = torch.arange(self.SIZE) % 4 == 0
            self.k[..., pair] = torch.where(loud, 0.0, -80.0)[:, None, None] * torch.tensor([1.0, 0.0])
        size = heads.value_dim or heads.head_dim
        self.v = torch.randn(self.SIZE, heads.num_kv_heads, size, generator=generator)

    def rows(self, ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of token ids."""
        return self.q[list(ids)], self.k[list(ids)], self.v[list(ids)]

    def write(self, memory: Memory, ids: Sequence[int], chunks: Sequence[int] = ()) -> Tensor:
        """Attend token ids in chunks that end at the given places, committing each; all outputs."""
        bounds = [0, *chunks, len(ids)]
        outs = []
        for low, high in pairwise(bounds):
            outs.append(memory.attend(*self.rows(ids[low:high])))
            memory.commit()
        return torch.cat(outs)

    def answer(
        self,
        past: Sequence[int],
        new: Sequence[int],
        *,
        parents: Sequence[int] | None = None,
        sees: Sees = everything,
        distance: Distance | None = None,
    ) -> Tensor:
        """Outputs (Q, H, V), float64, of new tokens behind a past: a run, or a tree with these parents."""
        parents = list(range(-1, len(new) - 1)) if parents is None else list(parents)
        depths: list[int] = []
        lines: list[set[int]] = []
        for node, parent in enumerate(parents):
            depths.append(0 if parent == -1 else depths[parent] + 1)
            lines.append({node} if parent == -1 else lines[parent] | {node})
        positions = [*range(len(past)), *(len(past) + depth for depth in depths)]
        visible = torch.zeros(len(new), len(positions), dtype=torch.bool)
        for row, line in enumerate(lines):
            for column in [*range(len(past)), *(len(past) + node for node in line)]:
                visible[row, column] = sees(len(past) + depths[row], positions[column])
        return self._attention(list(new), [*past, *new], positions, visible, distance)

    def _attention(
        self,
        new: list[int],
        ids: list[int],
        positions: list[int],
        visible: Tensor,
        distance: Distance | None,
    ) -> Tensor:
        heads = self.heads
        group = heads.num_heads // heads.num_kv_heads
        v = self.v[ids].double().repeat_interleave(group, dim=1)
        queries = positions[len(ids) - len(new) :]
        if distance is None:
            q = turned(self.q[new], queries, heads)
            k = turned(self.k[ids], positions, heads).repeat_interleave(group, dim=1)
            scores = torch.einsum("qhd,thd->hqt", q, k) * heads.scale
        else:
            # Each query is turned anew for each key, which is not turned.
            k = self.k[ids].double().repeat_interleave(group, dim=1)
            rows = [
                turned(
                    self.q[[row]].expand(len(ids), -1, -1), [distance(at, key) for key in positions], heads
                )
                for row, at in zip(new, queries, strict=True)
            ]
            scores = torch.einsum("qthd,thd->hqt", torch.stack(rows), k) * heads.scale
        if heads.softcap is not None:
            scores = heads.softcap * torch.tanh(scores / heads.softcap)
        apart = distance or (lambda query, key: query - key)
        scores = scores + biases(heads, [[apart(at, key) for key in positions] for at in queries])
        weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
        return torch.einsum("hqt,thv->qhv", weights, v)


def biases(heads: Heads, distances: Sequence[Sequence[int]]) -> Tensor:
    """What a layer adds to scores at each distance, (H, Q, T), float64; harmonic numbers are added up term by term."""
    bias = heads.bias
    if bias is None:
        return torch.zeros(heads.num_heads, 1, 1, dtype=torch.float64)

    def cost(distance: int) -> float:
        n = min(abs(distance), bias.limit or abs(distance))
        return n if bias.schedule == "linear" else math.fsum(1 / t for t in range(1, n + 1))

    table = torch.tensor([[cost(distance) for distance in row] for row in distances], dtype=torch.float64)
    return -bias.slopes.double()[:, None, None] * table


def turned(x: Tensor, positions: Sequence[int], heads: Heads) -> Tensor:
    """Rotary positions in complex float64."""
    if heads.rope is None:
        return x.double()
    half = len(heads.rope.frequencies)
    pairs = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
    angles = torch.tensor(positions, dtype=torch.float64)[:, None] * heads.rope.frequencies.double()
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([pairs.real, pairs.imag, x[..., 2 * half :].double()], dim=-1)


def storage_bound(table: TokenTable, unit: float, step: float = 0.0) -> float:
    """How far an output can move when stored numbers are off by at most `unit` relative plus `step` absolute.

    A key moves by at most u |k| + s sqrt(D), so a score by at most d = scale * |q| times that, a weight by a
    factor of at most e^(2 d), and a value by u |v| + s.
    """
    length = table.q.norm(dim=-1).max().item()
    key = unit * table.k.norm(dim=-1).max().item() + step * math.sqrt(table.heads.head_dim)
    moved = table.heads.scale * length * key
    return (math.exp(2 * moved) - 1 + unit) * table.v.abs().max().item() + step + TOLERANCE


def ids_of(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, TokenTable.SIZE, (length,), generator=generator).tolist()


def new_memory(heads: Heads = GROUPED, spec: str = "full", window: int | None = None) -> Memory:
    """An empty memory of one layer."""
    return Memory(heads, MemoryPlan.parse(spec), window)


def assert_equal_to(given: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    """Compare outputs, absolutely and relatively."""
    assert given.dtype == torch.float32
    torch.testing.assert_close(given.double(), wanted.double(), atol=tolerance, rtol=tolerance)


def refusal(memory: Memory, length: int) -> str | None:
    """Truncate; the message if the policy refuses to go back, else None."""
    try:
        memory.truncate(length)
    except ConfigError as error:
        return str(error)
    return None


def random_tree(size: int, generator: torch.Generator) -> Tree:
    """A tree of draft nodes in which every earlier node may be the parent."""
    return Tree([-1, *(int(torch.randint(0, node, (), generator=generator)) for node in range(1, size))])


def paths_of(tree: Tree) -> list[list[int]]:
    """The path from the root to every node."""
    paths: list[list[int]] = []
    for node, parent in enumerate(tree.parents):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    return paths


def read_with_detours(memory: Memory, table: TokenTable, past: Sequence[int], first: int) -> None:
    """Read a prompt, with rows in between that are taken back: behind `first` tokens, and behind two more."""
    memory.attend(*table.rows([*past[:first], 1, 2, 3]))
    memory.truncate(first + 1)
    memory.commit(is_prompt=True)
    memory.truncate(first)
    # A draft tree behind the next two tokens of the prompt, and then one of which nothing is kept.
    memory.attend(*table.rows([*past[first : first + 2], 4, 5, 6]), mask=Tree([-1, 0, 1, 1, 2]))
    memory.commit([0, 1], is_prompt=True)
    memory.attend(*table.rows([4, 5, 6]), mask=Tree([-1, 0, 0]))
    memory.commit([], is_prompt=True)
    memory.attend(*table.rows([*past[first + 2 :], 7, 8]))
    memory.commit(range(len(past) - first - 2))
