"""Where a model's parameters come from: a checkpoint, or random numbers.

Modules ask for their parameters by name while they are built, so a model is never held twice. The
names are those of the architecture (`blocks.0.mixer.query.weight`), whatever a file calls them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from plait.errors import ModelFileError
from plait.nn.checkpoints.base import Checkpoint
from plait.weights import Dense, Linear, Packed, Stacked, WeightFormat

__all__ = ["CheckpointParameters", "Entry", "Parameters", "RandomParameters"]


class Parameters:
    """A source of named parameters."""

    prefix: str = ""

    def under(self, prefix: str) -> Parameters:
        """The same source, with every name below `prefix`."""
        return _Under(self, prefix)

    def matrix(self, names: Sequence[str], columns: int, rows: Sequence[int]) -> Packed:
        """The named matrices on top of each other.

        Args:
            names: one for each matrix.
            columns: inputs of every one.
            rows: outputs of each.
        """
        raise NotImplementedError

    def vector(self, names: Sequence[str], sizes: Sequence[int]) -> Tensor:
        """The named vectors end to end, fp32."""
        raise NotImplementedError

    def linear(self, names: Sequence[str], columns: int, rows: Sequence[int], bias: bool) -> Linear:
        """One linear layer made of the named projections (`name.weight`, `name.bias`)."""
        weight = self.matrix([f"{name}.weight" for name in names], columns, rows)
        return Linear(weight, self.vector([f"{name}.bias" for name in names], rows) if bias else None)


@dataclass
class _Under(Parameters):
    source: Parameters
    prefix: str

    def matrix(self, names: Sequence[str], columns: int, rows: Sequence[int]) -> Packed:
        return self.source.matrix([f"{self.prefix}.{name}" for name in names], columns, rows)

    def vector(self, names: Sequence[str], sizes: Sequence[int]) -> Tensor:
        return self.source.vector([f"{self.prefix}.{name}" for name in names], sizes)


class Entry(NamedTuple):
    """Where a checkpoint keeps one parameter.

    Attributes:
        name: tensor name in the checkpoint.
        rows: the rows that belong to this parameter, when the tensor holds several.
        transposed: stored as (inputs, outputs).
        plus: constant added to every element (Gemma keeps norm weights less 1).
        reorder: from the number of rows to the index that puts them in our order.
    """

    name: str
    rows: slice | None = None
    transposed: bool = False
    plus: float = 0.0
    reorder: Callable[[int], Tensor] | None = None


class CheckpointParameters(Parameters):
    """Parameters read from a checkpoint.

    Args:
        checkpoint: an open checkpoint.
        entries: from our names to the checkpoint's.
        format: how matrices are stored in memory; None keeps each as it is in the file.
    """

    def __init__(
        self, checkpoint: Checkpoint, entries: Mapping[str, Entry], format: WeightFormat | None
    ) -> None:
        self.checkpoint = checkpoint
        self.entries = entries
        self.format = format

    def matrix(self, names: Sequence[str], columns: int, rows: Sequence[int]) -> Packed:
        if self.format is None:
            parts = [self._as_stored(name) for name in names]
            packed = parts[0] if len(parts) == 1 else Stacked(parts)
        else:
            dense = [self._dense(name) for name in names]
            packed = self.format.pack(dense[0] if len(dense) == 1 else torch.cat(dense))
        self._check_shape(names, packed.shape, (sum(rows), columns))
        return packed

    def vector(self, names: Sequence[str], sizes: Sequence[int]) -> Tensor:
        parts = [self._dense(name).to(torch.float32) for name in names]
        vector = parts[0] if len(parts) == 1 else torch.cat(parts)
        self._check_shape(names, tuple(vector.shape), (sum(sizes),))
        return vector

    def _entry(self, name: str) -> Entry:
        entry = self.entries.get(name)
        if entry is None or entry.name not in self.checkpoint.tensors():
            wanted = "nothing known" if entry is None else repr(entry.name)
            raise ModelFileError(
                f"{self.checkpoint.path}: {name} is missing (looked for {wanted}). The file is incomplete, "
                "or its configuration describes another model."
            )
        return entry

    def _dense(self, name: str) -> Tensor:
        entry = self._entry(name)
        tensor = self.checkpoint.load(entry.name)
        if entry.transposed:
            tensor = tensor.t().contiguous()
        if entry.rows is not None:
            tensor = tensor[entry.rows]
        if entry.reorder is not None:
            tensor = tensor[entry.reorder(tensor.shape[0])]
        return tensor.to(torch.float32) + entry.plus if entry.plus else tensor

    def _as_stored(self, name: str) -> Packed:
        entry = self._entry(name)
        if entry.transposed or entry.plus:
            return Dense(self._dense(name))
        packed = self.checkpoint.load_packed(entry.name)
        if entry.rows is not None:
            packed = packed.select(torch.arange(packed.shape[0])[entry.rows])
        if entry.reorder is not None:
            packed = packed.select(entry.reorder(packed.shape[0]))
        return packed

    def _check_shape(self, names: Sequence[str], found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if tuple(found) != wanted:
            raise ModelFileError(
                f"{self.checkpoint.path}: {' + '.join(names)} has shape {tuple(found)}, but the configuration "
                f"says {wanted}. The file does not match its configuration."
            )


class RandomParameters(Parameters):
    """Parameters for a new model: matrices uniform with variance 1 / inputs, norm weights 1, biases 0.

    Args:
        seed: of the random numbers.
        format: how matrices are stored; plain fp32, and trainable, when left out.
    """

    def __init__(self, seed: int = 0, format: WeightFormat | None = None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.format = format

    def matrix(self, names: Sequence[str], columns: int, rows: Sequence[int]) -> Packed:
        bound = math.sqrt(3.0 / columns)
        weight = torch.empty(sum(rows), columns).uniform_(-bound, bound, generator=self.generator)
        return Dense(weight) if self.format is None else self.format.pack(weight)

    def vector(self, names: Sequence[str], sizes: Sequence[int]) -> Tensor:
        return torch.cat(
            [
                torch.zeros(size) if name.endswith("bias") else torch.ones(size)
                for name, size in zip(names, sizes, strict=True)
            ]
        )
