"""Strands that wait, each as one run of bytes in a memory-mapped file, until they are read again.

A coded strand is a tree of some ten objects and twenty small tensors, which take more room than its numbers if
there are thousands of it. Here one outline stands for all strands of one form, and a strand is a run of bytes.
Native code reads it where the file is mapped: what describes codes to it lies behind them.
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
from plait.memory.strand import Layout, Strand
from plait.ops.coded import CODED

__all__ = ["SpillFile", "Spilled"]

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
    """

    strand: Strand
    places: tuple[_Place, ...]
    nbytes: int
    layout: Layout | None

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
            outline = _laid_out(_Outline(bare, tuple(places), length, None), numbers)
        where = self._room(outline.nbytes)
        self.write(_with_descriptions(outline, numbers, self.address(where)))
        return Spilled(self, self._outlines.setdefault(key, outline), strand.start, where)

    def write(self, numbers: Tensor) -> int:
        """Append bytes; returns where they are."""
        start = end = self._end
        left = numbers.numpy().data
        try:
            while len(left):
                written = os.pwrite(self._file, left, end)
                left, end = left[written:], end + written
        except OSError as error:
            raise _full(error) from error
        # Maps begin at whole pages.
        self._end = _whole_pages(end)
        return start

    def read(self, where: int, length: int) -> Tensor:
        """Bytes as a tensor over the file's own pages."""
        return torch.frombuffer(self._map(where, length), dtype=torch.uint8)

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
                pages = self._map(start, size)
            except OSError as error:
                raise _full(error) from error
            address = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
            self._mapped.append(_Mapped(start, start + size, pages, address))
            self._end = start
        return self._end

    def _map(self, where: int, length: int) -> mmap.mmap:
        # Writing to a copy would not change the file.
        return mmap.mmap(self._file, length, access=mmap.ACCESS_COPY, offset=where)


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
