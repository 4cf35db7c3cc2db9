"""SQL as trees, by sqlglot.

Sqlglot does not say where each node stands in the source. It writes a query back in one form, in which a node's
text stands inside its parent's; the tokens of that form are then aligned with those of the source.
"""

from __future__ import annotations

import difflib
from typing import Any

from plait.code.syntax import Syntax
from plait.decode.prediction_sets import Node
from plait.errors import import_extra

__all__ = ["SQL"]


class SQL:
    """SQL in sqlglot's common dialect. Keywords and quoting are compared in one form, names as they are.

    Raises:
        MissingExtraError: sqlglot is not installed.
    """

    name = "sql"

    def __init__(self) -> None:
        self._sqlglot: Any = import_extra("sqlglot", extra="sql", purpose="SQL")
        # Version 30 parted the class of all nodes from that of most.
        self._node = getattr(self._sqlglot.exp, "Expr", self._sqlglot.exp.Expression)

    def parse(self, source: bytes) -> Syntax | None:
        try:
            text = source.decode()
            tree = self._sqlglot.parse_one(text)
            written = tree.sql(comments=False)
            theirs = self._tokens(text)
            ours = self._tokens(written)
        except (self._sqlglot.errors.SqlglotError, ValueError, RecursionError):
            return None
        owners = [-1] * len(ours)
        nodes: list[Node] = []

        def build(node: Any, low: int, high: int) -> Node:
            place = len(nodes)
            nodes.append(Node(""))
            for index, (_, start, stop) in enumerate(ours):
                if low <= start and stop <= high:
                    owners[index] = place
            label = [type(node).__name__]
            children: list[tuple[str, bool, Node]] = []
            cursor = low
            for name, value in node.args.items():
                is_list = isinstance(value, list)
                for one in value if is_list else [value]:
                    if isinstance(one, self._node):
                        inside = one.sql(comments=False)
                        start = written.find(inside, cursor, high) if inside else -1
                        if start < 0:
                            start = written.find(inside, low, high) if inside else -1
                        stop = start + len(inside)
                        if start < 0:
                            start = stop = high
                        else:
                            cursor = stop
                        children.append((name, is_list, build(one, start, stop)))
                    elif one not in (None, False):
                        label.append(f"{name}={one!r}")
            nodes[place] = Node(" ".join(label), tuple(children))
            return nodes[place]

        try:
            root = build(tree, 0, len(written))
        except RecursionError:
            return None
        spans: list[tuple[int, int] | None] = [None] * len(nodes)
        matcher = difflib.SequenceMatcher(
            a=[word for word, _, _ in ours], b=[word for word, _, _ in theirs], autojunk=False
        )
        covers: list[set[int]] = [set() for _ in nodes]
        parents = _parents(root)
        for block in matcher.get_matching_blocks():
            for offset in range(block.size):
                node = owners[block.a + offset]
                while node >= 0:
                    covers[node].add(block.b + offset)
                    node = parents[node]
        for place, covered in enumerate(covers):
            if covered:
                first, last = theirs[min(covered)][1], theirs[max(covered)][2]
                spans[place] = (len(text[:first].encode()), len(text[:last].encode()))
        # What was not aligned, such as a keyword that is written in another way, is the whole query's.
        spans[0] = (len(source) - len(source.lstrip()), len(source.rstrip()))
        return Syntax(root, tuple(spans))

    def _tokens(self, text: str) -> list[tuple[str, int, int]]:
        """Tokens in upper case where they are keywords, with their characters [start, stop)."""
        return [
            (text[token.start : token.end + 1].upper(), token.start, token.end + 1)
            for token in self._sqlglot.tokenize(text)
        ]


def _parents(root: Node) -> list[int]:
    parents: list[int] = []
    stack = [(root, -1)]
    while stack:
        node, parent = stack.pop()
        stack += [(child, len(parents)) for _, _, child in reversed(node.children)]
        parents.append(parent)
    return parents
