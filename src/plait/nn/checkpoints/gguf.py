"""GGUF files, versions 2 and 3, little-endian: a bounded reader over a memory mapping.

The layout is that of the GGUF specification (ggml/docs/gguf.md): a header of typed metadata, a table
of tensors, then their data. Every count, length, offset and product is checked against the bytes
that are left before anything is allocated, and a header may take 64 MiB of memory plus the size of
the file, at most 128 MiB; so any file ends in a reader or in one `ModelFileError`.
"""

from __future__ import annotations

import math
import mmap
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NoReturn, Self

import numpy as np
import torch
from torch import Tensor

from plait.errors import ModelFileError
from plait.nn.checkpoints.base import TensorInfo
from plait.nn.checkpoints.files import GGUF_MAGIC, counted, damaged, file_start, shown
from plait.weights import Blocks, Dense, Packed
from plait.weights.ggml import BLOCK_FORMATS, dequantize

__all__ = ["GGUFCheckpoint"]

_DEFAULT_ALIGNMENT = 32
_ALIGNMENTS = tuple(1 << power for power in range(3, 17))
_MAX_DIMENSIONS = 4
_MAX_NAME = 65535
_MAX_NESTING = 4

# Memory that a header may take: this much for any file, and as much again as the file is long.
_MEMORY_FLOOR = 64 << 20
_MEMORY_SCALED = 64 << 20
# What Python keeps for each of these beside its contents, rounded up so far that the limit on memory
# also keeps the time below a second.
_ENTRY_COST, _TENSOR_COST, _ARRAY_COST, _STRING_COST = 512, 2048, 1024, 24

# Names of the tensor types 0, 1, 2, ..., eight in a row; some are retired.
# fmt: off
_FORMAT_NAMES = (
    "f32", "f16", "q4_0", "q4_1", "q4_2", "q4_3", "q5_0", "q5_1",
    "q8_0", "q8_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_k",
    "iq2_xxs", "iq2_xs", "iq3_xxs", "iq1_s", "iq4_nl", "iq3_s", "iq2_s", "iq4_xs",
    "i8", "i16", "i32", "i64", "f64", "iq1_m", "bf16", "q4_0_4_4",
    "q4_0_4_8", "q4_0_8_8", "tq1_0", "tq2_0", "iq4_nl_4_4", "iq4_nl_4_8", "iq4_nl_8_8", "mxfp4",
    "nvfp4", "q1_0",
)
# fmt: on
_PLAIN = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f64": torch.float64,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
}

_BOOL, _STRING, _ARRAY = 7, 8, 9
# Codes of the number types 0, 1, 2, ..., as struct and numpy both spell them.
_NUMBERS = {kind: code for kind, code in enumerate("BbHhIifB--Qqd") if code != "-"}
_LAYOUTS = {kind: struct.Struct("<" + code) for kind, code in _NUMBERS.items()}
_UINT32, _UINT64 = _LAYOUTS[4], _LAYOUTS[10]


class GGUFCheckpoint:
    """A GGUF file, memory-mapped.

    `metadata` is a dict in file order. Numbers, booleans and text are int, float, bool and str; an
    array of numbers is a read-only numpy array, an array of text a list of str, an array of arrays
    a list. Bytes of text that are not UTF-8 are kept as lone surrogates:
    `text.encode("utf-8", "surrogateescape")` gives the bytes back. Keys and tensor names must be UTF-8.

    Tensors share the mapping and stay valid after `close`; writing to one changes memory, never the
    file. While a tensor is alive the file may be replaced, but must not be shortened in place.

    Raises:
        ModelFileError: a missing, damaged, hostile, big-endian, version 1 or split file. A storage
            format that is not read is an error only when a tensor in it is loaded.
    """

    path: Path
    metadata: Mapping[str, Any]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not file_start(self.path).startswith(GGUF_MAGIC):
            raise ModelFileError(f"{self.path} is not a GGUF file. Give the path of a model.")
        self._map: mmap.mmap | None = _map(self.path)
        header = _Header(self.path, self._map)
        self.metadata = header.metadata
        self._entries = header.entries
        self._tensors, self._starts = header.tensors, header.starts

    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, in file order.

        `nbytes` of a format that is not read is the space up to the next tensor.
        """
        return MappingProxyType(self._tensors)

    def load(self, name: str) -> Tensor:
        """The tensor: floating-point and integer formats as stored, others dequantised to fp32.

        Raises:
            ModelFileError: no such tensor, or its format is not read.
        """
        info = self._info(name)
        if info.format in _PLAIN:
            return self._mapped(info, _PLAIN[info.format]).view(info.shape)
        return dequantize(self._mapped(info, torch.uint8), info.format).view(info.shape)

    def load_packed(self, name: str) -> Packed:
        """The two-dimensional tensor in the form it has in the file: `Dense` or `Blocks`.

        Raises:
            ModelFileError: no such tensor, it is not a matrix, or its format is not read.
        """
        info = self._info(name)
        if len(info.shape) != 2:
            raise ModelFileError(
                f"{self.path.name}: tensor {shown(name)} has shape {info.shape};"
                " only a matrix can be loaded packed."
            )
        if info.format in _PLAIN:
            return Dense(self.load(name))
        return Blocks(self._mapped(info, torch.uint8).view(info.shape[0], -1), info.format)

    def metadata_file(self) -> bytes:
        """A GGUF file that has the metadata of this one and no tensors.

        Raises:
            ModelFileError: the checkpoint is closed.
        """
        if self._map is None:
            raise ModelFileError(f"{self.path.name} is closed. Open the checkpoint again to copy from it.")
        count, first, end = self._entries
        return GGUF_MAGIC + struct.pack("<IQQ", 3, 0, count) + self._map[first:end]

    def close(self) -> None:
        """Let go of the file; it stays mapped as long as one of its tensors or arrays is alive."""
        # Closing the mapping itself would pull the memory from under those tensors.
        self._map = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        info = self._tensors.get(name)
        if info is None:
            raise ModelFileError(
                f"{self.path.name} has no tensor {shown(name)} among its {len(self._tensors)}."
            )
        if info.format not in _PLAIN and info.format not in BLOCK_FORMATS:
            raise ModelFileError(
                f"{self.path.name}: tensor {shown(name)} is stored as {info.format}, which is not read."
                f" Use a file in one of {', '.join(BLOCK_FORMATS)}."
            )
        return info

    def _mapped(self, info: TensorInfo, dtype: torch.dtype) -> Tensor:
        if self._map is None:
            raise ModelFileError(f"{self.path.name} is closed. Open the checkpoint again to load tensors.")
        count = info.nbytes // dtype.itemsize
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._starts[info.name])


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            # Copy on write: torch takes only writable memory, and the file must never change.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be mapped into memory: {error}.") from error


def _format_name(kind: int) -> str:
    return _FORMAT_NAMES[kind] if kind < len(_FORMAT_NAMES) else f"type-{kind}"


class _Header:
    """One pass over the header; `at` is the next byte, `memory` what may still be allocated."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.at = len(GGUF_MAGIC)
        self.memory = _MEMORY_FLOOR + min(self.size, _MEMORY_SCALED)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.starts: dict[str, int] = {}

        self._read_version()
        num_tensors, num_entries = self._number(_UINT64), self._number(_UINT64)
        # The shortest entry is an empty name, a type and one byte; the shortest tensor has no dimensions.
        self._check_room(num_entries, 8 + 4 + 1, "metadata entries")
        self._check_room(num_tensors, 8 + 4 + 4 + 8, "tensors")
        first = self.at
        for _ in range(num_entries):
            self._read_entry()
        self.entries = (num_entries, first, self.at)
        self._check_whole()
        described = self._read_tensor_table(num_tensors)
        self._place_tensors(described)

    # The file as a whole.

    def _read_version(self) -> None:
        version = self._number(_UINT32)
        if version & 0xFFFF == 0:
            raise ModelFileError(
                f"{self.path.name} is a big-endian GGUF file; only little-endian ones are read."
                " Convert it with gguf-convert-endian."
            )
        if version not in (2, 3):
            raise ModelFileError(
                f"{self.path.name} is GGUF version {version}; versions 2 and 3 are read."
                " Convert the model again."
            )

    def _check_whole(self) -> None:
        parts = self.metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise ModelFileError(
                f"{self.path.name} is one of {parts} parts of a model."
                " Join them with llama-gguf-split --merge."
            )

    # Metadata.

    def _read_entry(self) -> None:
        self._charge(_ENTRY_COST)
        key = self._name("a metadata key")
        if key in self.metadata:
            self._fail(f"the metadata key {shown(key)} is given twice")
        self.metadata[key] = self._value(self._number(_UINT32), key, _MAX_NESTING)

    def _value(self, kind: int, key: str, nesting: int) -> Any:
        if kind == _STRING:
            return self._strings(1)[0]
        if kind == _ARRAY:
            if nesting == 0:
                self._fail(f"the arrays in {shown(key)} are nested more than {_MAX_NESTING} deep")
            return self._array(key, nesting - 1)
        layout = _LAYOUTS.get(kind)
        if layout is None:
            self._fail(f"the value of {shown(key)} has the unknown type {kind}")
        value = self._number(layout)
        if kind == _BOOL and value > 1:
            self._fail(f"the boolean {shown(key)} is neither 0 nor 1")
        return bool(value) if kind == _BOOL else value

    def _array(self, key: str, nesting: int) -> Any:
        kind, count = self._number(_UINT32), self._number(_UINT64)
        self._charge(_ARRAY_COST)
        if kind == _STRING:
            return self._strings(count)
        if kind == _ARRAY:
            self._check_room(count, 4 + 8, f"arrays in {shown(key)}")
            return [self._value(_ARRAY, key, nesting) for _ in range(count)]
        if kind not in _NUMBERS:
            self._fail(f"the array {shown(key)} has the unknown element type {kind}")
        return self._numbers(kind, count, key)

    def _numbers(self, kind: int, count: int, key: str) -> np.ndarray[Any, Any]:
        """A read-only view of the mapping; only booleans are copied, to check them."""
        dtype = np.dtype("<" + _NUMBERS[kind])
        self._check_room(count, dtype.itemsize, f"numbers in {shown(key)}")
        numbers = np.frombuffer(self.data, dtype, count, self.at)
        self.at += count * dtype.itemsize
        if kind == _BOOL:
            self._charge(count)
            if count and numbers.max() > 1:
                self._fail(f"a boolean in {shown(key)} is neither 0 nor 1")
            numbers = numbers.astype(np.bool_)
        numbers.flags.writeable = False
        return numbers

    def _strings(self, count: int) -> list[str]:
        self._check_room(count, 8, "strings")
        # Vocabularies have hundreds of thousands of strings, so this loop works on local names.
        data, size, at, memory = self.data, self.size, self.at, self.memory
        read_length, size_of = struct.Struct("<Q").unpack_from, sys.getsizeof
        strings = []
        for _ in range(count):
            start = at + 8
            if start > size:
                self._fail("the file ends inside a string")
            at = start + read_length(data, at)[0]
            if at > size:
                self._fail(
                    f"a string claims {counted(at - start)} bytes but the file has {size - start} left"
                )
            # While one is decoded, its bytes, a narrow and a wide form are there together.
            if 8 * (at - start) > memory:
                self._fail_memory()
            string = str(data[start:at], "utf-8", "surrogateescape")
            memory -= size_of(string) + _STRING_COST
            strings.append(string)
        self.at, self.memory = at, memory
        return strings

    # Tensors.

    def _read_tensor_table(self, num_tensors: int) -> list[tuple[int, str, tuple[int, ...], str]]:
        """The offset, name, shape and format of each tensor."""
        table, names = [], set()
        for _ in range(num_tensors):
            self._charge(_TENSOR_COST)
            name = self._name("a tensor name")
            if name in names:
                self._fail(f"the tensor {shown(name)} is given twice")
            names.add(name)
            num_dimensions = self._number(_UINT32)
            if num_dimensions > _MAX_DIMENSIONS:
                self._fail(f"tensor {shown(name)} has {num_dimensions} dimensions, above {_MAX_DIMENSIONS}")
            # The file lists the fastest dimension first.
            shape = tuple(self._number(_UINT64) for _ in range(num_dimensions))[::-1]
            if 0 in shape:
                self._fail(f"tensor {shown(name)} has no values: its shape is {shape}")
            kind = self._number(_UINT32)
            table.append((self._number(_UINT64), name, shape, _format_name(kind)))
        return table

    def _place_tensors(self, table: list[tuple[int, str, tuple[int, ...], str]]) -> None:
        """Give every tensor its range of the file; ranges must lie inside it and not overlap."""
        alignment = self._alignment()
        data_start = -(-self.at // alignment) * alignment
        end_of_last = data_start
        placed = sorted(table, reverse=True)
        while placed:
            offset, name, shape, format = placed.pop()
            start = data_start + offset
            if offset % alignment:
                self._fail(f"tensor {shown(name)} starts at {offset}, not a multiple of {alignment}")
            if start >= self.size:
                self._fail(
                    f"tensor {shown(name)} starts at byte {counted(start)} but the file has {self.size}"
                )
            if start < end_of_last or (placed and placed[-1][0] == offset):
                self._fail(f"tensor {shown(name)} overlaps another tensor")
            nbytes = self._tensor_nbytes(name, shape, format)
            if nbytes is None:
                next_start = data_start + placed[-1][0] if placed else self.size
                nbytes = min(next_start, self.size) - start
            elif nbytes > self.size - start:
                self._fail(
                    f"tensor {shown(name)} claims {counted(nbytes)} bytes"
                    f" but the file has {self.size - start} left"
                )
            end_of_last = start + nbytes
            self.tensors[name] = TensorInfo(name, shape, format, nbytes)
            self.starts[name] = start

    def _tensor_nbytes(self, name: str, shape: tuple[int, ...], format: str) -> int | None:
        """Bytes of a tensor by its shape, or None for a format of unknown size."""
        if format in BLOCK_FORMATS:
            block = BLOCK_FORMATS[format]
            if (shape[-1] if shape else 1) % block.elements:
                self._fail(
                    f"tensor {shown(name)} in {format} has shape {shape},"
                    f" not a multiple of {block.elements} columns"
                )
            return math.prod(shape) // block.elements * block.nbytes
        if format in _PLAIN:
            return math.prod(shape) * _PLAIN[format].itemsize
        return None

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment not in _ALIGNMENTS:
            given = alignment if isinstance(alignment, int) else "not a whole number"
            self._fail(
                f"general.alignment is {given}; it must be a power of two"
                f" from {_ALIGNMENTS[0]} to {_ALIGNMENTS[-1]}"
            )
        return alignment

    # Parts of both.

    def _number(self, layout: struct.Struct) -> Any:
        if self.size - self.at < layout.size:
            self._fail("the header ends early")
        (value,) = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return value

    def _name(self, what: str) -> str:
        length = self._number(_UINT64)
        if length > _MAX_NAME:
            self._fail(f"{what} is {counted(length)} bytes long, above {_MAX_NAME}")
        self._check_room(length, 1, f"bytes of {what}")
        self._charge(8 * length)
        start, self.at = self.at, self.at + length
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError:
            self._fail(f"{what} is not UTF-8")

    def _check_room(self, count: int, size: int, what: str) -> None:
        left = self.size - self.at
        if count * size > left:
            self._fail(f"the header claims {counted(count)} {what} but the file has {left} bytes left")

    def _charge(self, nbytes: int) -> None:
        self.memory -= nbytes
        if self.memory < 0:
            self._fail_memory()

    def _fail_memory(self) -> NoReturn:
        limit = (_MEMORY_FLOOR + min(self.size, _MEMORY_SCALED)) >> 20
        self._fail(f"its metadata would take more than the {limit} MiB of memory that its size allows")

    def _fail(self, what: str) -> NoReturn:
        raise damaged(self.path, what)
