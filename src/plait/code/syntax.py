"""Programs as trees whose nodes know their bytes."""

from __future__ import annotations

import ast
import warnings
from typing import NamedTuple, Protocol

from plait.decode.prediction_sets import Node
from plait.errors import ConfigError, suggestion

__all__ = ["Language", "Python", "Syntax", "language"]

# What holds no more than a name; it is part of its parent's label.
_IN_LABEL = (ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)


class Syntax(NamedTuple):
    """A parsed program.

    Attributes:
        root: the program.
        spans: of each node in preorder, its bytes [start, stop) in the source; None for one without a place
            of its own.
    """

    root: Node
    spans: tuple[tuple[int, int] | None, ...]


class Language(Protocol):
    """A language whose programs can be compared as trees."""

    name: str

    def parse(self, source: bytes) -> Syntax | None:
        """The tree of a program, or None for what does not parse. Leading and trailing space is no part of it."""
        ...


class Python:
    """Python, by its own `ast`: operators and contexts are part of their expressions, an f-string is one node."""

    name = "python"

    def parse(self, source: bytes) -> Syntax | None:
        try:
            text = source.decode()
            lead = len(source) - len(source.lstrip())
            with warnings.catch_warnings():
                # An invalid escape in predicted code is no business of whoever predicts.
                warnings.simplefilter("ignore", SyntaxWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
                tree = ast.parse(text.strip())
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
        body = source[lead:]
        # Lines as Python counts them; a form feed is no end of a line.
        starts = [0]
        for line in body.replace(b"\r\n", b"\0\n").replace(b"\r", b"\n").split(b"\n"):
            starts.append(starts[-1] + len(line) + 1)
        spans: list[tuple[int, int] | None] = []

        def build(node: ast.AST) -> Node:
            place = len(spans)
            spans.append(None)
            if isinstance(node, ast.Module):
                spans[place] = (lead, lead + len(body.rstrip()))
            elif getattr(node, "end_lineno", None) is not None:
                first, last = (
                    starts[line - 1] + column
                    for line, column in (
                        (node.lineno, node.col_offset),  # type: ignore[attr-defined]
                        (node.end_lineno, node.end_col_offset),  # type: ignore[attr-defined]
                    )
                )
                spans[place] = (lead + first, lead + last)
            if isinstance(node, ast.JoinedStr):
                return Node(ast.dump(node))
            label = [type(node).__name__]
            children: list[tuple[str, bool, Node]] = []
            for name, value in ast.iter_fields(node):
                is_list = isinstance(value, list)
                for one in value if is_list else [value]:
                    if isinstance(one, ast.AST) and not isinstance(one, _IN_LABEL):
                        children.append((name, is_list, build(one)))
                    elif isinstance(one, ast.AST):
                        label.append(f"{name}={type(one).__name__}")
                    elif one is None and is_list:
                        spans.append(None)
                        children.append((name, is_list, Node("None")))
                    else:
                        label.append(f"{name}={type(one).__name__}:{one!r}")
            return Node(" ".join(label), tuple(children))

        try:
            return Syntax(build(tree), tuple(spans))
        except RecursionError:
            return None


def language(name: str) -> Language:
    """The language of a name: `python`, or `sql` with the extra of the same name.

    Raises:
        ConfigError: an unknown language.
        MissingExtraError: `sql` without sqlglot.
    """
    if name == "python":
        return Python()
    if name == "sql":
        from plait.code.sql import SQL

        return SQL()
    raise ConfigError(f"Unknown language {name!r}.{suggestion(name, ('python', 'sql'))} Known: python, sql.")
