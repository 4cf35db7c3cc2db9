"""The tree of shared strands: what sequences begin with is stored once, and visited once for all of them.

Source: the hierarchy of shared prefixes of Juravsky et al. 2024, arXiv:2402.05099, section 3, kept as a
radix tree: a node holds a run of tokens and, for each layer, the strands that remember them. The products
themselves are those of `plait.memory.attend`, which finds shared strands by their identity.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from plait.memory import Memory, MemoryPlan, Past, Strand, allocated_bytes

__all__ = ["Namespace", "PrefixTree", "common_prefix"]


@dataclass(frozen=True)
class Namespace:
    """Who may share with whom: sequences share strands only if every field is equal.

    Args:
        tenant: on whose behalf the tokens are read.
        plan: how the past is kept.
        adapter: what changes the model, which changes what it remembers of the same tokens.
    """

    tenant: str
    plan: MemoryPlan
    adapter: object | None = None


class Node:
    """A run of tokens, and the strands of every layer that remember it.

    Attributes:
        tokens: the run, never empty but in a root.
        runs: the strands of each layer, oldest first; nothing else keeps their storage.
        children: by their first tokens.
        readers: the pasts that begin with this node.
        used: when it was last begun to be read, or ended.
    """

    def __init__(self, parent: Node | None, tokens: tuple[int, ...], runs: list[list[Strand]]) -> None:
        self.parent = parent
        self.tokens = tokens
        self.runs = runs
        self.children: dict[tuple[int, ...], Node] = {}
        self.readers: set[Past] = set()
        self.used = 0
        self.nbytes = allocated_bytes(itertools.chain.from_iterable(runs))


class PrefixTree:
    """Beginnings of sequences that have been computed, compared token by token.

    Tokens are shared in multiples of `grain`, so that no strand is too short to be worth a visit. Every
    past must be one whose `is_shareable` holds, and must be released before it is dropped.

    Args:
        grain: tokens that are shared together, at least 1.
    """

    def __init__(self, grain: int = 32) -> None:
        self.grain = grain
        self.nbytes = 0
        self._roots: dict[Namespace, Node] = {}
        self._paths: dict[Past, list[Node]] = {}
        self._clock = itertools.count(1)

    def whole(self, length: int) -> int:
        """`length` rounded down to tokens that can be shared."""
        return length // self.grain * self.grain

    def shared_bytes(self, past: Past) -> int:
        """Bytes of the strands of this tree that a past begins with."""
        return sum(node.nbytes for node in self._paths.get(past, ()))

    def adopt(self, namespace: Namespace, tokens: Sequence[int], past: Past) -> int:
        """Let a past begin with what is stored of `tokens`.

        Args:
            tokens: what the sequence begins with.
            past: holds nothing yet, or what it adopted before of the same tokens.

        Returns:
            How many tokens the past begins with now.
        """
        path = self._path(namespace, tokens)
        if _length(path) > len(past):
            self._read(past, path)
        return len(past)

    def insert(self, namespace: Namespace, tokens: Sequence[int], past: Past) -> None:
        """Store what a past has computed of its first tokens; the past then reads it from here.

        Args:
            tokens: what the past begins with; all of it is computed. A rest below `grain` is left out.
        """
        tokens = tokens[: self.whole(len(tokens))]
        path = self._path(namespace, tokens)
        done = _length(path)
        if done > _length(self._paths.get(past, [])):
            # Another sequence has computed the same tokens: one copy is enough.
            self._read(past, path)
        if done == len(tokens):
            return
        parent = path[-1] if path else self._roots.setdefault(namespace, Node(None, (), []))
        runs = [layer.run(done, len(tokens)) for layer in _memories(past)]
        node = Node(parent, tuple(tokens[done:]), runs)
        parent.children[node.tokens[: self.grain]] = node
        self.nbytes += node.nbytes
        self._paths[past] = [*path, node]
        node.readers.add(past)
        self._touch([*path, node])

    def release(self, past: Past) -> None:
        """Note that a past is no longer read, so that what it began with may be evicted."""
        path = self._paths.pop(past, [])
        for node in path:
            node.readers.discard(past)
        self._touch(path)
        if path:
            self._join_up(path[-1])

    def evict(self) -> int:
        """Forget the leaf that nobody has read for longest.

        Returns:
            The bytes that were freed; 0 if every leaf is being read.
        """
        leaves = [node for node in self._nodes() if not node.children and not node.readers]
        if not leaves:
            return 0
        leaf = min(leaves, key=lambda node: node.used)
        self._remove(leaf)
        return leaf.nbytes

    def check_integrity(self) -> None:
        """Assert that tokens, strands, readers and bytes agree with each other; for tests."""
        for namespace, root in self._roots.items():
            assert root.children, f"an empty tree is kept for {namespace}"
        for node in self._nodes():
            assert node.parent is not None
            assert node.tokens, "a node without tokens"
            assert len(node.tokens) % self.grain == 0, "a node that is no multiple of the grain"
            assert node.parent.children[node.tokens[: self.grain]] is node
            depth = sum(len(above.tokens) for above in _above(node))
            for run in node.runs:
                at = depth
                for strand in run:
                    assert strand.position == at, "strands that do not follow each other"
                    at += len(strand)
                assert at == depth + len(node.tokens), "strands of other tokens than the node's"
            assert node.nbytes == allocated_bytes(itertools.chain.from_iterable(node.runs))
            assert node.used <= node.parent.used or node.parent.parent is None
            assert all(node in self._paths[past] for past in node.readers)
        everything = allocated_bytes(strand for node in self._nodes() for run in node.runs for strand in run)
        assert self.nbytes == everything == sum(node.nbytes for node in self._nodes())
        for past, path in self._paths.items():
            for index, layer in enumerate(_memories(past)):
                strands = [strand for node in path for strand in node.runs[index]]
                own = [strand for strand in layer.strands if strand.position >= 0]
                assert all(mine is theirs for mine, theirs in zip(own, strands, strict=False))
                assert len(own) >= len(strands)
            assert all(past in node.readers for node in path)
            assert all(above is node.parent for above, node in itertools.pairwise(path))

    def _nodes(self) -> Iterator[Node]:
        """Every node but the roots."""
        found = list(self._roots.values())
        while found:
            children = found.pop().children.values()
            yield from children
            found.extend(children)

    def _path(self, namespace: Namespace, tokens: Sequence[int]) -> list[Node]:
        """The nodes that `tokens` begin with; the last of them is split where the tokens differ."""
        path: list[Node] = []
        node, at = self._roots.get(namespace), 0
        while node is not None:
            child = node.children.get(tuple(tokens[at : at + self.grain]))
            if child is None:
                break
            rest = tuple(tokens[at : at + len(child.tokens)])
            shared = self.whole(common_prefix(child.tokens, rest))
            if shared < len(child.tokens):
                child = self._split(child, shared)
            path.append(child)
            node, at = child, at + shared
        return path

    def _read(self, past: Past, path: list[Node]) -> None:
        self._paths[past] = path
        for node in path:
            node.readers.add(past)
        self._touch(path)
        for index in range(len(past.layers)):
            self._point([past], index)

    def _split(self, node: Node, at: int) -> Node:
        """Put a node for the first `at` tokens above a node, and return it; readers follow."""
        assert node.parent is not None
        front = Node(node.parent, node.tokens[:at], [[] for _ in node.runs])
        front.parent.children[front.tokens[: self.grain]] = front  # type: ignore[union-attr]
        front.readers, front.used = set(node.readers), node.used
        for past in node.readers:
            place = self._paths[past].index(node)
            self._paths[past] = [*self._paths[past][:place], front, *self._paths[past][place:]]
        self.nbytes -= node.nbytes
        node.parent, node.tokens = front, node.tokens[at:]
        front.children[node.tokens[: self.grain]] = node
        for index, run in enumerate(node.runs):
            # Layer by layer, so that only one layer is held twice for a moment.
            front.runs[index], node.runs[index] = _split_run(run, at)
            self._point(node.readers, index)
        for half in (front, node):
            half.nbytes = allocated_bytes(itertools.chain.from_iterable(half.runs))
            self.nbytes += half.nbytes
        return front

    def _join_up(self, node: Node) -> None:
        """Join a node with those above it that lead to it alone, as the turns of a conversation do.

        A node that is more than twice as long stays, so that a token is copied a few times at most.
        """
        parent = node.parent
        while parent is not None and parent.parent is not None:
            is_chain = len(parent.children) == 1 and parent.readers == node.readers
            if not is_chain or len(parent.tokens) > 2 * len(node.tokens):
                return
            parent.parent.children[parent.tokens[: self.grain]] = node
            node.parent, node.tokens = parent.parent, parent.tokens + node.tokens
            for past in node.readers:
                self._paths[past] = [other for other in self._paths[past] if other is not parent]
            for index, (before, after) in enumerate(zip(parent.runs, node.runs, strict=True)):
                node.runs[index], parent.runs[index] = _join_runs(before, after), []
                self._point(node.readers, index)
            self.nbytes -= parent.nbytes + node.nbytes
            node.nbytes = allocated_bytes(itertools.chain.from_iterable(node.runs))
            self.nbytes += node.nbytes
            parent = node.parent

    def _point(self, pasts: Iterable[Past], layer: int) -> None:
        """Let pasts read one layer of their paths as it is stored now."""
        for past in pasts:
            strands = [strand for node in self._paths[past] for strand in node.runs[layer]]
            _memories(past)[layer].adopt(strands)

    def _remove(self, leaf: Node) -> None:
        assert leaf.parent is not None
        del leaf.parent.children[leaf.tokens[: self.grain]]
        self.nbytes -= leaf.nbytes
        self._roots = {name: root for name, root in self._roots.items() if root.children}

    def _touch(self, path: Sequence[Node]) -> None:
        now = next(self._clock)
        for node in path:
            node.used = now


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of tokens that two sequences of one type begin with in common."""
    low, width, end = 0, 1, min(len(a), len(b))
    # Slices are compared in C, so strides that grow while they agree are quicker than a loop over tokens.
    while low < end:
        high = min(low + width, end)
        if a[low:high] == b[low:high]:
            low, width = high, 2 * width
        elif high - low == 1:
            break
        else:
            width = (high - low) // 2
    return low


def _length(path: Sequence[Node]) -> int:
    return sum(len(node.tokens) for node in path)


def _above(node: Node) -> Iterator[Node]:
    """The nodes between the root and a node, the nearest first."""
    while node.parent is not None:
        node = node.parent
        yield node


def _memories(past: Past) -> list[Memory]:
    return [layer for layer in past.layers if isinstance(layer, Memory)]


def _split_run(run: Sequence[Strand], at: int) -> tuple[list[Strand], list[Strand]]:
    """The strands of the first `at` tokens and those of the rest, the two halves of one in storage of their own."""
    front: list[Strand] = []
    back: list[Strand] = []
    for strand in run:
        if at >= len(strand):
            front.append(strand)
        elif at <= 0:
            back.append(strand)
        else:
            first, second = strand.split(at)
            front.append(first.copied())
            back.append(second.copied())
        at -= len(strand)
    return front, back


def _join_runs(front: Sequence[Strand], back: Sequence[Strand]) -> list[Strand]:
    """The strands of two runs that follow each other, the last of one and the first of the other as one."""
    joined = front[-1].joined(back[0])
    return [*front, *back] if joined is None else [*front[:-1], joined, *back[1:]]
