"""Small real data for networks of one bit: digits that people wrote, and Python's own standard library and manual.

Splits are by a fixed seed or by file, the same for every method; what is held out is only measured on.
Shapes: N samples.
"""

from __future__ import annotations

import ast
import importlib
import io
import keyword
import random
import tokenize
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from plait.claims.texts import chapters
from plait.errors import import_extra
from plait.train.corpus import python_sources

__all__ = ["TASKS", "Samples", "Task"]

_SPLIT_SEED = 2301
_HELD_OUT = 5  # every so many files and chapters
_PER_FILE = 60
_POINTS = 32
_LINE, _SHORTEST = 48, 24  # bytes
_WINDOW = 16  # tokens


class Samples(NamedTuple):
    """Inputs (N, ...) and labels (N,) int64."""

    inputs: Tensor
    labels: Tensor


class Task(NamedTuple):
    """Something to learn.

    Attributes:
        classes: labels that there are.
        symbols: ids that inputs consist of; 0 where they are numbers.
    """

    name: str
    learned: Samples
    held_out: Samples
    classes: int
    symbols: int = 0


def digits(learned: int, held_out: int) -> Task:
    """Digits that people wrote: 8 by 8 pixels, (N, 1, 8, 8), in [-1, 1]."""
    pixels, labels = _pixels()
    return _split("digits", (pixels / 8 - 1)[:, None], labels, learned, held_out, classes=10)


def points(learned: int, held_out: int) -> Task:
    """The same digits as sets of points: of the 32 darkest pixels x, y and ink, (N, 32, 3), each in [-1, 1]."""
    pixels, labels = _pixels()
    ink, place = pixels.flatten(1).topk(_POINTS)
    rows, columns = place // pixels.shape[2], place % pixels.shape[2]
    cloud = torch.stack([columns / 3.5 - 1, rows / 3.5 - 1, ink / 8 - 1], dim=2)
    return _split("points", cloud, labels, learned, held_out, classes=10)


def lines(learned: int, held_out: int) -> Task:
    """What a line is from: code, a comment or a docstring of the standard library, or its manual; bytes (N, 48)."""
    sources = _parted(python_sources().values())
    manual = _parted(chapters().values())
    parts = []
    for count, texts, of_manual in zip((learned, held_out), sources, manual, strict=True):
        each = -(-count // len(_KINDS))
        kinds: list[list[bytes]] = [[] for _ in _KINDS]
        for text in texts:
            for kind, found in zip(kinds, _lines_of(text), strict=False):
                kind += found[:_PER_FILE]
            if min(map(len, kinds[:-1])) >= each:
                break
        kinds[-1] = [line for text in of_manual for line in _long_lines(text.splitlines())[:_PER_FILE]]
        chosen = [(line, number) for number, kind in enumerate(kinds) for line in kind[:each]]
        random.Random(_SPLIT_SEED).shuffle(chosen)
        inputs = torch.tensor([list(line.ljust(_LINE, b"\0")) for line, _ in chosen])
        parts.append(Samples(inputs, torch.tensor([number for _, number in chosen])))
    return Task("lines", parts[0], parts[1], classes=len(_KINDS), symbols=256)


def events(learned: int, held_out: int) -> Task:
    """Which kind of token comes next in a program, from the 16 before it: ids of kinds, (N, 16)."""
    runs: list[list[list[str]]] = []
    for count, texts in zip((learned, held_out), _parted(python_sources().values()), strict=True):
        found: list[list[str]] = []
        for number, text in enumerate(texts):
            kinds = list(_token_kinds(text))
            starts = list(range(len(kinds) - _WINDOW))
            random.Random(_SPLIT_SEED + number).shuffle(starts)
            found += [kinds[start : start + _WINDOW + 1] for start in starts[:_PER_FILE]]
            if len(found) >= count:
                break
        runs.append(found[:count])
    # Kinds that are not among what is learned are of one kind of their own.
    known = {
        kind: index for index, kind in enumerate(sorted({kind for run in runs[0] for kind in run}), start=1)
    }
    parts = []
    for part in runs:
        ids = torch.tensor([[known.get(kind, 0) for kind in run] for run in part])
        parts.append(Samples(ids[:, :-1].contiguous(), ids[:, -1].contiguous()))
    return Task("events", parts[0], parts[1], classes=len(known) + 1, symbols=len(known) + 1)


TASKS: dict[str, Callable[[int, int], Task]] = {
    "digits": digits,
    "points": points,
    "lines": lines,
    "events": events,
}

_KINDS = ("code", "comment", "docstring", "manual")


def _pixels() -> tuple[Tensor, Tensor]:
    """Ink of 1,797 digits from 0 to 16, (N, 8, 8), and which digits they are."""
    import_extra("sklearn", extra="bibench", purpose="plait bench bibench")
    found = importlib.import_module("sklearn.datasets").load_digits()
    return torch.tensor(found.images, dtype=torch.float32), torch.tensor(found.target)


def _split(name: str, inputs: Tensor, labels: Tensor, learned: int, held_out: int, classes: int) -> Task:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    # What is held out comes from the end, whatever the numbers asked for.
    held_out = min(held_out, len(order) // 3)
    first, last = order[: min(learned, len(order) - held_out)], order[len(order) - held_out :]
    return Task(name, Samples(inputs[first], labels[first]), Samples(inputs[last], labels[last]), classes)


def _parted(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Whole texts to learn from and to measure on, in an order drawn from the seed."""
    order = list(texts)
    random.Random(_SPLIT_SEED).shuffle(order)
    return [text for number, text in enumerate(order) if number % _HELD_OUT], order[::_HELD_OUT]


def _long_lines(lines: list[str]) -> list[bytes]:
    stripped = (line.strip().encode()[:_LINE] for line in lines)
    return [line for line in stripped if len(line) >= _SHORTEST]


def _lines_of(text: str) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Lines of code, of comments without their mark, and of docstrings."""
    code, comments = [], []
    is_start = True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.append(token.string.lstrip("#!: "))
        elif token.type == tokenize.NAME and is_start:
            code.append(token.line.splitlines()[0])
        is_start = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.NL)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = [
        ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, documented)
    ]
    return _long_lines(code), _long_lines(comments), _long_lines("\n".join(docs).splitlines())


def _token_kinds(text: str) -> Iterator[str]:
    """Kinds of tokens: operators and keywords each by themselves; no comments or empty lines."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME and keyword.iskeyword(token.string):
            yield token.string
        elif token.type not in (tokenize.COMMENT, tokenize.NL):
            yield tokenize.tok_name[token.exact_type]
