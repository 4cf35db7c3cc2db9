"""A model of which more or less is loaded: blocks of its matrices in the order of a stack, read from its file.

A file of `plait quantize --format bitstack` holds the first block of every matrix, and all others behind each other
in the order in which they are loaded. So a larger model is read by going on, and a smaller one made by letting go.
"""

from __future__ import annotations

import copy
import threading
import weakref
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plait.errors import ConfigError, ModelFileError
from plait.nn.checkpoints.packed import PackedCheckpoint
from plait.spec import bytes_of
from plait.weights import BlockStack, Elastic

__all__ = ["ElasticWeights", "Resized", "StackFile", "open_stack"]


class Resized(NamedTuple):
    """What a change of size did.

    Attributes:
        nbytes: of the model's weights now.
        added: bytes that were read from the file.
        freed: bytes that were let go of.
    """

    nbytes: int
    added: int
    freed: int


class StackFile:
    """Where the blocks of a file lie, and how large a model made of some of them is. The file is kept open.

    Args:
        checkpoint: an open checkpoint with a stack.

    Raises:
        ModelFileError: it has no stack, or the file is gone.
    """

    def __init__(self, checkpoint: PackedCheckpoint) -> None:
        if checkpoint.order is None:
            raise ModelFileError(f"{checkpoint.path} has no stack of blocks.")
        self.path = checkpoint.file
        self.order = checkpoint.order
        self._places = checkpoint.places()
        self.matrices = checkpoint.stacks()
        first = {name: self._places[f"{name}.block0"][1] for name in self.matrices}
        inside = {f"{name}.block{i}" for name, depth in self.matrices.items() for i in range(depth)}
        self.other_bytes = sum(size for key, (_, size) in self._places.items() if key not in inside)
        self.weights = sum(
            checkpoint.tensors()[name].shape[0] * checkpoint.tensors()[name].shape[1]
            for name in self.matrices
        )
        self._sizes = list(
            accumulate((first[name] for name in self.order), initial=self.other_bytes + sum(first.values()))
        )
        try:
            self._file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise ModelFileError(f"{self.path} could not be opened: {error}.") from error
        self._reading = threading.Lock()
        weakref.finalize(self, self._file.close)

    def __deepcopy__(self, memo: dict[int, Any]) -> StackFile:
        # It never changes, so a copy of what holds it can share it.
        return self

    def sizes(self) -> list[int]:
        """Bytes of the model at every position of the stack, from one block of each matrix to all; increasing."""
        return list(self._sizes)

    def bits(self, position: int) -> float:
        """Bits of each weight of the stack's matrices at a position."""
        return 8 * (self._sizes[position] - self.other_bytes) / max(1, self.weights)

    def position(self, budget: int | str | None = None, bits: float | None = None) -> int:
        """The highest position within a budget for the whole model, or within bits for each weight of the stack.

        Raises:
            ConfigError: even the first is too large; the message says how large it is.
        """
        if budget is not None and bits is not None:
            raise ConfigError("A model is read up to a budget or up to bits, not both. Leave one out.")
        limit = float("inf")
        if budget is not None:
            limit = bytes_of(budget)
        elif bits is not None:
            limit = self.other_bytes + bits * self.weights / 8
        found = bisect_right(self._sizes, limit) - 1
        if found < 0:
            raise ConfigError(
                f"{self.path.parent.name} has sizes from {self._sizes[0]} to {self._sizes[-1]} bytes, "
                f"{self.bits(0):.2f} to {self.bits(len(self.order)):.2f} bits a weight. "
                f"Got {f'a budget of {limit:.0f} bytes' if bits is None else f'{bits} bits'}."
            )
        return found

    def held(self, position: int) -> dict[str, int]:
        """How many blocks each matrix has at a position."""
        counts = dict.fromkeys(self.matrices, 1)
        for name in self.order[:position]:
            counts[name] += 1
        return counts

    def read(self, name: str, index: int) -> Tensor:
        """One block, into memory of its own.

        Raises:
            ModelFileError: the file ends before it, or cannot be read.
        """
        start, size = self._places[f"{name}.block{index}"]
        block = torch.empty(size, dtype=torch.uint8)
        view, got = memoryview(block.numpy().data), 0
        try:
            with self._reading:
                self._file.seek(start)
                while got < size:
                    count = self._file.readinto(view[got:])
                    if not count:
                        raise ModelFileError(
                            f"{self.path} ends inside block {index} of {name}. The file is damaged; "
                            "nothing was changed."
                        )
                    got += count
        except OSError as error:
            raise ModelFileError(
                f"{self.path}: block {index} of {name} could not be read: {error}."
            ) from error
        return block


class ElasticWeights:
    """The matrices of a loaded model whose blocks come and go.

    Args:
        file: where the blocks are.
        matrices: those of the model, by name, as they are held at `position`.
        position: how much of the stack they hold.

    Attributes:
        guard: held while the model computes, and while its size changes.
    """

    def __init__(self, file: StackFile, matrices: Mapping[str, BlockStack], position: int) -> None:
        self.file, self.matrices, self.position = file, dict(matrices), position
        self.guard = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> ElasticWeights:
        with self.guard:
            return ElasticWeights(self.file, copy.deepcopy(self.matrices, memo), self.position)

    def sizes(self) -> list[int]:
        """Bytes that the model's weights may have; see `StackFile.sizes`."""
        return self.file.sizes()

    def nbytes(self) -> int:
        """Bytes of the model's weights now."""
        return self.file.other_bytes + sum(matrix.nbytes() for matrix in self.matrices.values())

    def resize(self, budget: int | str | None = None, *, bits: float | None = None) -> Resized:
        """Load or let go of blocks until the model is as large as the limit allows, or whole without one.

        The change is made between two forward passes; grown back, the model gives the same bits as before. What
        sequences and sessions have read stays as other weights wrote it: start new ones, and a new engine where one
        keeps what requests have in common, when that matters. If anything fails, the model is as it was.

        Args:
            budget: bytes of all weights, or text such as `48MB`.
            bits: bits for each weight of the matrices of the blocks.

        Raises:
            ConfigError: a limit below the smallest size.
            ModelFileError: the file was cut short or cannot be read.
        """
        target = self.file.position(budget, bits)
        with self.guard:
            before = self.nbytes()
            added = self._grow(target) if target > self.position else 0
            if target < self.position:
                counts = self.file.held(target)
                for name in dict.fromkeys(self.file.order[target : self.position]):
                    self.matrices[name].hold(self.matrices[name].blocks[: counts[name]])
            self.position = target
            after = self.nbytes()
        return Resized(after, added, max(0, before - after))

    def _grow(self, target: int) -> int:
        """Read the blocks up to a position, then add them all; how many bytes."""
        new: dict[str, list[Tensor]] = {}
        for name in self.file.order[self.position : target]:
            blocks = new.setdefault(name, list(self.matrices[name].blocks))
            blocks.append(self.file.read(name, len(blocks)))
        before = self.nbytes()
        for name, blocks in new.items():
            self.matrices[name].hold(blocks)
        return self.nbytes() - before


def open_stack(checkpoint: PackedCheckpoint, format: Elastic | None) -> ElasticWeights:
    """Read as much of a file's stack as a format asks for, all of it where there is none.

    From then on the checkpoint hands out these matrices; each block is in memory of its own.

    Raises:
        ConfigError: even the first blocks are more than the format allows.
        ModelFileError: a block is damaged.
    """
    file = StackFile(checkpoint)
    position = file.position() if format is None else file.position(format.budget or None, format.bits)
    matrices = {
        name: checkpoint.stack(name, [file.read(name, index) for index in range(count)])
        for name, count in file.held(position).items()
    }
    return ElasticWeights(file, matrices, position)
