"""Which rows of a forward pass have which adapter, and the products that look it up.

Shapes: N packed rows, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from plait.memory import Rows
from plait.weights.adapters import Change

__all__ = ["PartHook", "Routed", "prefix_of", "routed"]


class Routed(Protocol):
    """An adapter, as far as products have to know it."""

    @property
    def at(self) -> Mapping[str, Change]:
        """Its changes by the names of matrices."""
        ...

    def prefix(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values that stand before the text in a layer, (G, L, D) each; None for none."""
        ...


class Route(NamedTuple):
    """Rows that have one adapter; None for all rows of the pass."""

    rows: slice | Tensor | None
    adapter: Routed


_ROUTES: ContextVar[tuple[Route, ...]] = ContextVar("adapters of the rows", default=())


@contextmanager
def routed(rows: Rows, adapters: Sequence[Routed | None]) -> Iterator[None]:
    """Let products of this thread change the rows of each segment as its adapter says.

    Args:
        adapters: one for each segment, None for none.
    """
    if not any(adapter is not None for adapter in adapters):
        yield
        return
    of: dict[int, tuple[Routed, list[slice]]] = {}
    for segment, adapter in zip(rows.segments, adapters, strict=True):
        if adapter is not None and segment.length:
            of.setdefault(id(adapter), (adapter, []))[1].append(segment.rows)
    routes = []
    for adapter, slices in of.values():
        count = sum(one.stop - one.start for one in slices)
        if count == len(rows):
            routes.append(Route(None, adapter))
        elif len(slices) == 1:
            routes.append(Route(slices[0], adapter))
        else:
            routes.append(Route(torch.cat([torch.arange(one.start, one.stop) for one in slices]), adapter))
    token = _ROUTES.set(tuple(routes))
    try:
        yield
    finally:
        _ROUTES.reset(token)


def prefix_of(layer: int | None) -> tuple[Tensor, Tensor] | None:
    """Keys and values before the text of all rows, in the parallel form, (G, L, D) each; None for none."""
    routes = _ROUTES.get()
    return None if layer is None or not routes else routes[0].adapter.prefix(layer)


class PartHook:
    """The product of a linear layer whose outputs are those of one or more matrices, with their adapters.

    Args:
        parts: name and number of outputs of each matrix, in order.
    """

    def __init__(self, parts: Sequence[tuple[str, int]]) -> None:
        self.parts: list[tuple[str, int, int]] = []
        start = 0
        for name, count in parts:
            self.parts.append((name, start, start + count))
            start += count

    def __call__(self, x: Tensor, product: Callable[[Tensor], Tensor], entry: Tensor | None = None) -> Tensor:
        """`product(x)` (N, O) of rows x (N, I), changed where rows have adapters.

        Args:
            entry: (N, O), what the branch read that the product ends; None for other products.
        """
        y = product(x)
        for rows, adapter in _ROUTES.get():
            if not any(name in adapter.at for name, _, _ in self.parts):
                continue
            own = x if rows is None else x[rows]
            before = y if rows is None else y[rows]
            read = entry if rows is None or entry is None else entry[rows]
            pieces = [
                self._changed(adapter.at.get(name), own, before, start, stop, product, read)
                for name, start, stop in self.parts
            ]
            after = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
            if rows is None:
                y = after
            else:
                y[rows] = after
        return y

    def _changed(
        self,
        change: Change | None,
        x: Tensor,
        y: Tensor,
        start: int,
        stop: int,
        product: Callable[[Tensor], Tensor],
        entry: Tensor | None,
    ) -> Tensor:
        part = y[:, start:stop]
        if change is None:
            return part
        return change.apply_to(x, part, lambda z: product(z)[:, start:stop], entry)
