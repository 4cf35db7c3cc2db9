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

from plait.errors import ConfigError, ModelFileError
from plait.nn.checkpoints.base import Checkpoint
from plait.weights import Dense, Linear, Packed, Stacked, WeightFormat
from plait.weights.ggml import Q8_0

__all__ = ["OUTER", "CheckpointParameters", "Entry", "Parameters", "RandomParameters", "keep_outer"]


# Matrices outside the blocks, which formats of few bits leave as they are.
OUTER = frozenset({"embedding.weight", "head.weight", "positions.weight"})
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        self._used: set[str] = set()

    def matrix(self, names: Sequence[str], columns: int, rows: Sequence[int]) -> Packed:
        for name, count in zip(names, rows, strict=True):
            self._check_shape(name, (count, columns))
        if self.format is None:
            parts = [self._as_stored(name) for name in names]
            return parts[0] if len(parts) == 1 else Stacked(parts)
        if names[0] in OUTER and not self.format.packs_embeddings:
            return keep_outer(self._as_stored(names[0]))
        dense = [self._dense(name) for name in names]
        try:
            return self.format.pack(dense[0] if len(dense) == 1 else torch.cat(dense))
        except ConfigError as error:
            raise ConfigError(f"{', '.join(names)}: {error}") from error

    def vector(self, names: Sequence[str], sizes: Sequence[int]) -> Tensor:
        for name, size in zip(names, sizes, strict=True):
            self._check_shape(name, (size,))
        parts = [self._dense(name).to(torch.float32) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def unused(self) -> list[str]:
        """Tensors of the checkpoint that nothing has asked for, in file order."""
        return [name for name in self.checkpoint.tensors() if name not in self._used]

    def _entry(self, name: str) -> Entry:
        entry = self.entries.get(name)
        if entry is None or entry.name not in self.checkpoint.tensors():
            wanted = "nothing known" if entry is None else repr(entry.name)
            raise ModelFileError(
                f"{self.checkpoint.path}: {name} is missing (looked for {wanted}). The file is incomplete, "
                "or its configuration describes another model."
            )
        self._used.add(entry.name)
        return entry

    def _check_shape(self, name: str, wanted: tuple[int, ...]) -> None:
        """Before anything is loaded or reordered: what the file claims against what is wanted."""
        entry = self._entry(name)
        found = self.checkpoint.tensors()[entry.name].shape
        if entry.transposed:
            found = found[::-1]
        if entry.rows is not None and found:
            found = (len(range(found[0])[entry.rows]), *found[1:])
        if tuple(found) != wanted:
            raise ModelFileError(
                f"{self.checkpoint.path}: {name} has shape {tuple(found)}, but the configuration "
                f"says {wanted}. The file does not match its configuration."
            )

    def _dense(self, name: str) -> Tensor:
        entry = self._entry(name)
        tensor = self.checkpoint.load(entry.name)
        if tensor.dtype not in _FLOATS:
            raise ModelFileError(
                f"{self.checkpoint.path}: {entry.name!r} is stored as {str(tensor.dtype).removeprefix('torch.')}, "
                "which is not read. Convert the model to bfloat16."
            )
        if entry.transposed:
            tensor = tensor.t()
        if entry.rows is not None:
            tensor = tensor[entry.rows]
        tensor = tensor.contiguous()
        if entry.reorder is not None:
            tensor = tensor[entry.reorder(tensor.shape[0])]
        return tensor.to(torch.float32) + entry.plus if entry.plus else tensor

    def _as_stored(self, name: str) -> Packed:
        entry = self._entry(name)
        packed = self.checkpoint.load_packed(entry.name)
        if entry.transposed or entry.plus or isinstance(packed, Dense):
            return Dense(self._dense(name))
        if entry.rows is not None:
            packed = packed.select(torch.arange(packed.shape[0])[entry.rows])
        if entry.reorder is not None:
            packed = packed.select(entry.reorder(packed.shape[0]))
        return packed


def keep_outer(packed: Packed) -> Packed:
    """An embedding or head beside blocks of few bits: as it is where it is in codes, else in q8_0 where that fits."""
    if not isinstance(packed, Dense) or packed.shape[1] % 32:
        return packed
    return Q8_0().pack(packed.weight)


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
