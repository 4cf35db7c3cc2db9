"""Strands that wait, each as one run of bytes in a memory-mapped file, until they are read again.

A coded strand is a tree of some ten objects and twenty small tensors, which take more room than its numbers if
there are thousands of it. Here one outline stands for all strands of one form, and a strand is a run of bytes.
Native code reads it where the file is mapped: what describes codes to it lies behind them.
"""

from __future__ import annotations

import copy
import mmap
import os
import tempfile
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import fields, is_dataclass
from functools import cached_property
from itertools import islice
from math import prod
from typing import NamedTuple, overload

import torch
from torch import Tensor

from plait.errors import CapacityError
from plait.memory.strand import Layout, Strand
from plait.ops.coded import CODED

__all__ = ["SpillFile", "Spilled", "SpilledRows", "SpilledStrands"]

# Tensors of a run of bytes begin at multiples of this, as the allocator's own do.
_ALIGNMENT = 64

# Bytes of the file that are mapped together: at first, and at most, but for a strand that is larger.
_FIRST_MAPPED, _MOST_MAPPED = 1 << 20, 1 << 26

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
        layout: `Strand.layout`, its addresses counted from the run's first byte; None where it has none.
        number: of those of a file.
    """

    strand: Strand
    places: tuple[_Place, ...]
    nbytes: int
    layout: Layout | None
    number: int = 0

    def strand_of(self, numbers: Tensor) -> Strand:
        """The strand whose tensors lie in a run of bytes (n,), at the start of its frame."""
        places = iter(self.places)

        def tensor(_: Tensor) -> Tensor:
            offset, shape, dtype = place = next(places)
            return numbers[offset : offset + place.nbytes].view(dtype).view(shape)

        with torch.inference_mode(False):
            return self.strand.relocated(tensor)


class _Mapped(NamedTuple):
    """Bytes [start, stop) of a file, and where they lie."""

    start: int
    stop: int
    pages: mmap.mmap
    address: int


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

    @property
    def place(self) -> tuple[int, ...] | None:
        """`Strand.place` of the strand, where the file is mapped for native code; None without a layout."""
        layout = self.outline.layout
        if layout is None:
            return None
        base, strand = self.file.address(self.where), self.outline.strand
        at = layout._replace(keys=base + layout.keys, values=base + layout.values)
        return (*at, strand.offset + self.start, len(strand))

    def mapped(self) -> Tensor:
        """Its bytes, where they are mapped for native code."""
        return self.file.view(self.where, self.nbytes)

    def rest(self) -> None:
        """Let these leave memory until they are read again; a hint, where the system takes it."""
        self.file.rest(self.where, self.nbytes)

    def load(self) -> Strand:
        """The strand, its tensors mapped from the file; they are unmapped when they are freed."""
        with torch.inference_mode(False):
            numbers = self.file.read(self.where, self.outline.nbytes)
        return self.outline.strand_of(numbers).restarted(self.start)


class SpillFile:
    """A file without a name, to which strands are appended; it is gone when nothing uses it any more.

    Strands of one form share all but their numbers and where they start. The file stands in the folder for temporary
    files (`TMPDIR`). Space of strands that nobody needs is freed with it.
    """

    def __init__(self) -> None:
        self._outlines: dict[Hashable, _Outline] = {}
        self._end = 0
        self._mapped: list[_Mapped] = []

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
        with torch.inference_mode(False):
            numbers = torch.zeros(length, dtype=torch.uint8)
            for tensor, place in zip(tensors, places, strict=True):
                part = numbers[place.offset : place.offset + place.nbytes]
                part.view(place.dtype).view(place.shape).copy_(tensor)
        key = (_form(bare), tuple(places))
        outline = self._outlines.get(key)
        if outline is None:
            outline = _laid_out(_Outline(bare, tuple(places), length, None, len(self._outlines)), numbers)
        where = self._room(outline.nbytes)
        self.write(where, _with_descriptions(outline, numbers, self.address(where)))
        self._end = where + _whole_pages(outline.nbytes)
        return Spilled(self, self._outlines.setdefault(key, outline), strand.start, where)

    def spilled(self, number: int, start: int, where: int) -> Spilled:
        """A strand that was put here: the number of its outline, its `start`, and where it is."""
        return Spilled(self, next(islice(self._outlines.values(), number, None)), start, where)

    def reserve(self, length: int) -> int:
        """Where bytes may be written later; they are zeros until then, and take no room on disk.

        Raises:
            CapacityError: the file cannot be mapped as far.
        """
        where = self._room(length)
        self._end = where + _whole_pages(length)
        return where

    def write(self, where: int, numbers: Tensor) -> None:
        """Write bytes (n,) at a place.

        Raises:
            CapacityError: the disk is full.
        """
        left = numbers.numpy().data
        try:
            while len(left):
                written = os.pwrite(self._file, left, where)
                left, where = left[written:], where + written
        except OSError as error:
            raise _full(error) from error

    def read(self, where: int, length: int) -> Tensor:
        """Bytes as a tensor over the file's own pages."""
        # Writing to a copy does not change the file.
        pages = mmap.mmap(self._file, length, access=mmap.ACCESS_COPY, offset=where)
        return torch.frombuffer(pages, dtype=torch.uint8)

    def address(self, where: int) -> int:
        """Where a byte of the file lies in memory, for as long as the file does."""
        mapped = self._mapped_at(where)
        return mapped.address + where - mapped.start

    def view(self, where: int, length: int) -> Tensor:
        """Bytes of one strand as a tensor, where they are mapped for native code."""
        mapped = self._mapped_at(where)
        with torch.inference_mode(False):
            return torch.frombuffer(
                mapped.pages, dtype=torch.uint8, count=length, offset=where - mapped.start
            )

    def rest(self, where: int, length: int) -> None:
        """Let the bytes of one strand leave memory until they are read again; a hint, where the system takes it."""
        if hasattr(mmap, "MADV_DONTNEED"):
            mapped = self._mapped_at(where)
            mapped.pages.madvise(mmap.MADV_DONTNEED, where - mapped.start, _whole_pages(length))

    def _mapped_at(self, where: int) -> _Mapped:
        return next(mapped for mapped in reversed(self._mapped) if mapped.start <= where)

    def _room(self, length: int) -> int:
        """Where the next strand goes: behind the last one, in bytes that are mapped together."""
        if not self._mapped or self._end + length > self._mapped[-1].stop:
            start = self._mapped[-1].stop if self._mapped else 0
            size = max(min(_FIRST_MAPPED << len(self._mapped), _MOST_MAPPED), _whole_pages(length))
            try:
                # What is not written takes no room on disk.
                os.ftruncate(self._file, start + size)
                # Shared with the file: what is written later to pages that were read already must be seen.
                pages = mmap.mmap(self._file, size, access=mmap.ACCESS_WRITE, offset=start)
            except OSError as error:
                raise _full(error) from error
            address = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
            self._mapped.append(_Mapped(start, start + size, pages, address))
            self._end = start
        return self._end


class SpilledRows:
    """Rows of numbers, all of one shape and dtype, in a file: `GrownRows` of which nothing is held in memory.

    Forks share what is written until either of them has more.
    """

    def __init__(self, file: SpillFile) -> None:
        self.file = file
        self.length = 0
        self._storage = torch.empty(0)
        self._where = 0
        self._is_shared = False

    @property
    def numbers(self) -> Tensor:
        """The rows, where the file is mapped."""
        return self._storage[: self.length]

    def append(self, row: Tensor) -> None:
        """Write a row behind the others.

        Raises:
            CapacityError: the disk is full; nothing has changed then.
        """
        row = row.detach().contiguous()
        size = row.numel() * row.itemsize
        if self.length == len(self._storage) or self._is_shared:
            capacity = max(16, 2 * self.length)
            where = self.file.reserve(capacity * size)
            if self.length:
                self.file.write(where, _bytes_of(self.numbers))
            numbers = self.file.view(where, capacity * size)
            with torch.inference_mode(False):
                self._storage, self._where = numbers.view(row.dtype).view(capacity, *row.shape), where
            self._is_shared = False
        self.file.write(self._where + self.length * size, _bytes_of(row))
        self.length += 1

    def truncate(self, length: int) -> None:
        """Keep the first rows only."""
        self.length = min(self.length, length)

    def tensors(self) -> list[Tensor]:
        """What it holds in memory: nothing."""
        return []

    def fork(self) -> SpilledRows:
        twin = copy.copy(self)
        self._is_shared = twin._is_shared = True
        return twin


class SpilledStrands(Sequence[Spilled]):
    """Strands in a file; in memory there is nothing of each."""

    def __init__(self, file: SpillFile) -> None:
        self._file = file
        self._rows = SpilledRows(file)

    def __len__(self) -> int:
        return self._rows.length

    @overload
    def __getitem__(self, index: int) -> Spilled: ...
    @overload
    def __getitem__(self, index: slice) -> list[Spilled]: ...
    def __getitem__(self, index: int | slice) -> Spilled | list[Spilled]:
        found = self._rows.numbers[index].tolist()
        return (
            [self._file.spilled(*row) for row in found]
            if isinstance(index, slice)
            else self._file.spilled(*found)
        )

    def append(self, strand: Strand) -> None:
        """Write a strand behind the others.

        Raises:
            CapacityError: the disk is full; nothing has changed then.
        """
        put = self._file.put(strand)
        self._rows.append(torch.tensor([put.outline.number, put.start, put.where]))

    def __delitem__(self, index: slice) -> None:
        if index.step is not None or index.stop is not None:
            raise IndexError(f"Only the last strands can be removed, as in strands[5:]. Got {index}.")
        self._rows.truncate(len(range(len(self))[: index.start]))

    def copy(self) -> SpilledStrands:
        """These strands, to which others can be appended; see `SpilledRows.fork`."""
        twin = SpilledStrands(self._file)
        twin._rows = self._rows.fork()
        return twin


def _bytes_of(numbers: Tensor) -> Tensor:
    return numbers.reshape(-1).view(torch.uint8)


def _whole_pages(length: int) -> int:
    return -(-length // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


def _full(error: OSError) -> CapacityError:
    return CapacityError(
        f"No room on disk for remembered tokens: {error.strerror} in {tempfile.gettempdir()}. Free some, set "
        "TMPDIR to another folder, or keep them in memory."
    )


def _descriptions(outline: _Outline, numbers: Tensor, to: int) -> list[bytes]:
    """What describes the codes of a strand whose run of bytes (n,) goes to an address: of keys, and of values.

    Nothing for plain numbers, and where a description looks at more than these bytes.
    """
    form = outline.strand_of(numbers).native_form()
    found = [] if form is None else [part.description_at(numbers, to) for part in (form.keys, form.values)]
    return [part for part in found if part is not None]


def _laid_out(outline: _Outline, numbers: Tensor) -> _Outline:
    """The outline of the first strand of a form, with its layout and room for the descriptions of its codes."""
    layout = outline.strand_of(numbers).layout
    if layout is None or layout.number != CODED:
        base = numbers.data_ptr()
        at = layout and layout._replace(keys=layout.keys - base, values=layout.values - base)
        return outline._replace(layout=at)
    described = _descriptions(outline, numbers, 0)
    if len(described) < 2:
        return outline
    sizes = [-(-len(part) // _ALIGNMENT) * _ALIGNMENT for part in described]
    at = layout._replace(keys=outline.nbytes, values=outline.nbytes + sizes[0])
    return outline._replace(layout=at, nbytes=outline.nbytes + sum(sizes))


def _with_descriptions(outline: _Outline, numbers: Tensor, to: int) -> Tensor:
    """A run of bytes that goes to an address, with the descriptions of its codes behind it."""
    layout = outline.layout
    if layout is None or layout.number != CODED:
        return numbers
    with torch.inference_mode(False):
        whole = torch.zeros(outline.nbytes, dtype=torch.uint8)
    whole[: len(numbers)] = numbers
    for at, part in zip((layout.keys, layout.values), _descriptions(outline, numbers, to), strict=True):
        whole[at : at + len(part)] = torch.frombuffer(bytearray(part), dtype=torch.uint8)
    return whole


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
