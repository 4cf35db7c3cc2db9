"""Strands that wait in a memory-mapped file until they are read again."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from plait.errors import CapacityError
from plait.memory.strand import Strand

__all__ = ["SpillFile", "Spilled"]


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the file."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Spilled:
    """A strand whose numbers are in a file.

    Attributes:
        outline: the strand without its numbers.
        places: where its tensors lie, in the order of `Strand.relocated`.
        file: the file.
    """

    outline: Strand
    places: tuple[_Place, ...]
    file: SpillFile

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers in the file."""
        return sum(prod(place.shape) * place.dtype.itemsize for place in self.places)

    def load(self) -> Strand:
        """The strand, its tensors mapped from the file; they are unmapped when they are freed."""
        places = iter(self.places)
        return self.outline.relocated(lambda _: self.file.map(next(places)))


class SpillFile:
    """A file without a name, to which strands are appended; it is gone when nothing uses it any more.

    It stands in the folder for temporary files (`TMPDIR`). Space of strands that nobody needs is freed
    with the file.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as this object
        self._end = 0
        weakref.finalize(self, self._file.close)

    def put(self, strand: Strand) -> Spilled:
        """Write a strand's tensors behind what is there.

        Raises:
            CapacityError: the disk is full.
        """
        places: list[_Place] = []

        def write(tensor: Tensor) -> Tensor:
            numbers = tensor.detach().cpu().contiguous().reshape(-1)
            places.append(_Place(self._end, tuple(tensor.shape), tensor.dtype))
            if numbers.numel():
                self._append(numbers.view(torch.uint8).numpy().data)
            return torch.empty(0, dtype=tensor.dtype)

        outline = strand.relocated(write)
        return Spilled(outline, tuple(places), self)

    def map(self, place: _Place) -> Tensor:
        """A tensor over the file's own pages; writing to it would not change the file."""
        count = prod(place.shape)
        if count == 0:
            return torch.empty(place.shape, dtype=place.dtype)
        length = count * place.dtype.itemsize
        pages = mmap.mmap(self._file.fileno(), length, access=mmap.ACCESS_COPY, offset=place.offset)
        return torch.frombuffer(pages, dtype=place.dtype, count=count).view(place.shape)

    def _append(self, numbers: memoryview) -> None:
        end = self._end
        try:
            while len(numbers):
                written = os.pwrite(self._file.fileno(), numbers, end)
                numbers, end = numbers[written:], end + written
        except OSError as error:
            raise CapacityError(
                f"No room on disk for remembered tokens: {error.strerror} in {tempfile.gettempdir()}. Free some, set "
                "TMPDIR to another folder, or keep them in memory."
            ) from error
        # Maps begin at whole pages.
        self._end = -(-end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
