"""Strands that wait, each as one run of bytes in a memory-mapped file, until they are read again.

A coded strand is a tree of some ten objects and twenty small tensors, which take more room than its numbers if
there are thousands of it. Here one outline stands for all strands of one form, and a strand is a run of bytes.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import fields, is_dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from plait.errors import CapacityError
from plait.memory.strand import Strand

__all__ = ["SpillFile", "Spilled"]

# Tensors of a run of bytes begin at multiples of this, as the allocator's own do.
_ALIGNMENT = 64

# Stands for each tensor of an outline.
_ABSENT = torch.empty(0)


class _Place(NamedTuple):
    """Where a tensor lies in a run of bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class _Outline(NamedTuple):
    """What strands of one form have in common.

    Attributes:
        strand: one of them without its numbers, at the start of its frame.
        places: of its tensors, in the order of `Strand.relocated`.
        nbytes: of the run of bytes.
    """

    strand: Strand
    places: tuple[_Place, ...]
    nbytes: int


class Spilled(NamedTuple):
    """A strand whose numbers are in a file.

    Attributes:
        file: the file.
        outline: its form.
        start: frame position of its first token.
        where: the place of its first byte.
    """

    file: SpillFile
    outline: _Outline
    start: int
    where: int

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers in the file."""
        return self.outline.nbytes

    def load(self) -> Strand:
        """The strand, its tensors mapped from the file; they are unmapped when they are freed."""
        places = iter(self.outline.places)
        with torch.inference_mode(False):
            numbers = self.file.read(self.where, self.outline.nbytes)

            def tensor(_: Tensor) -> Tensor:
                offset, shape, dtype = place = next(places)
                return numbers[offset : offset + place.nbytes].view(dtype).view(shape)

            return self.outline.strand.relocated(tensor).restarted(self.start)


class SpillFile:
    """A file without a name, to which strands are appended; it is gone when nothing uses it any more.

    Strands of one form share all but their numbers and where they start. The file stands in the folder for temporary
    files (`TMPDIR`). Space of strands that nobody needs is freed with it.
    """

    def __init__(self) -> None:
        self._outlines: dict[Hashable, _Outline] = {}
        self._end = 0

    @cached_property
    def _file(self) -> int:
        """Its descriptor; opened when something is written, since most layers of a short text need none."""
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as this object
        weakref.finalize(self, file.close)
        return file.fileno()

    def put(self, strand: Strand) -> Spilled:
        """Write a strand's numbers behind what is there.

        Raises:
            CapacityError: the disk is full; nothing has changed then.
        """
        tensors: list[Tensor] = []
        places: list[_Place] = []
        length = 0

        def take(tensor: Tensor) -> Tensor:
            nonlocal length
            tensors.append(tensor.detach())
            places.append(_Place(length, tuple(tensor.shape), tensor.dtype))
            length += -(-places[-1].nbytes // _ALIGNMENT) * _ALIGNMENT
            return _ABSENT

        bare = strand.relocated(take).restarted(0)
        outline = self._outlines.setdefault(
            (_form(bare), tuple(places)), _Outline(bare, tuple(places), length)
        )
        with torch.inference_mode(False):
            numbers = torch.zeros(length, dtype=torch.uint8)
            for tensor, place in zip(tensors, places, strict=True):
                part = numbers[place.offset : place.offset + place.nbytes]
                part.view(place.dtype).view(place.shape).copy_(tensor)
        return Spilled(self, outline, strand.start, self.write(numbers))

    def write(self, numbers: Tensor) -> int:
        """Append bytes; returns where they are."""
        start = end = self._end
        left = numbers.numpy().data
        try:
            while len(left):
                written = os.pwrite(self._file, left, end)
                left, end = left[written:], end + written
        except OSError as error:
            raise CapacityError(
                f"No room on disk for remembered tokens: {error.strerror} in {tempfile.gettempdir()}. Free some, set "
                "TMPDIR to another folder, or keep them in memory."
            ) from error
        # Maps begin at whole pages.
        self._end = -(-end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        return start

    def read(self, where: int, length: int) -> Tensor:
        """Bytes as a tensor over the file's own pages."""
        # Writing to a copy would not change the file.
        pages = mmap.mmap(self._file, length, access=mmap.ACCESS_COPY, offset=where)
        return torch.frombuffer(pages, dtype=torch.uint8)


def _form(value: object) -> Hashable:
    """All of a strand but its numbers, which an outline lacks; tensors of a layer's geometry count as themselves."""
    if isinstance(value, Tensor):
        return id(value)
    if isinstance(value, Strand):
        return (type(value), *((name, _form(held)) for name, held in sorted(vars(value).items())))
    if is_dataclass(value) and not isinstance(value, type):
        return (type(value), *(_form(getattr(value, field.name)) for field in fields(value)))
    if isinstance(value, Sequence) and not isinstance(value, (str, range)):
        return (type(value), *map(_form, value))
    assert isinstance(value, Hashable)
    return value
