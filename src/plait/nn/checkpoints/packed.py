"""Models whose matrices Plait has packed: one safetensors file that says what each of its tensors is part of.

The file `plait.safetensors` holds, for a matrix `blocks.0.mixer.query.weight`, tensors such as
`blocks.0.mixer.query.weight.codes`, and vectors under their own names. The entry `plait.weights` of its
`__metadata__` is a JSON object:

    version      1
    config       the model, as `TransformerConfig.to_json` writes it
    matrices     {name: {"kind", "shape", "settings", "spec"}}; `spec` is the format it was packed in
    made         what it was made from and with
    order        only where matrices are stacks of blocks: the names of those that get a further block, in the
                 order in which blocks are loaded; behind all else, the blocks lie in this order

Tensors lie in the order of their alignment, from a multiple of 64 bytes on, in the layout in which they are
multiplied; so a mapped file is used without a copy.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from plait.errors import ConfigError, ModelFileError
from plait.files import replacing
from plait.nn.checkpoints.base import TensorInfo
from plait.nn.checkpoints.files import damaged, file_start, shown
from plait.nn.checkpoints.gguf import GGUFCheckpoint
from plait.nn.checkpoints.safetensors import SafetensorsCheckpoint, json_object
from plait.weights import PACKED_KINDS, BlockStack, Packed

__all__ = ["PACKED_NAME", "TEXT_NAME", "PackedCheckpoint", "write_packed"]

PACKED_NAME, TEXT_NAME = "plait.safetensors", "tokenizer.gguf"
VERSION, _NOTE, _ALIGNMENT = 1, "plait.weights", 64
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


class PackedCheckpoint:
    """A folder with `plait.safetensors`, or such a file; memory-mapped.

    `metadata` is that of `tokenizer.gguf` where the folder has one, else empty. Names of tensors are
    those of the architecture.

    Raises:
        ModelFileError: a missing, damaged or hostile file, one of a later version, or one that holds a kind
            of matrix that is not known; the message names the matrix.
    """

    path: Path
    metadata: Mapping[str, Any]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        is_folder = os.path.isdir(self.path)
        file = self.path / PACKED_NAME if is_folder else self.path
        text = file.parent / TEXT_NAME
        self.metadata = {}
        if is_folder and os.path.exists(text):
            with GGUFCheckpoint(text) as source:
                self.metadata = source.metadata
        self.file = file
        self._file = SafetensorsCheckpoint(file)
        self._header = _header(file, self._file.notes[file.name].get(_NOTE))
        self.config: dict[str, Any] = self._header["config"]
        self.made: dict[str, Any] = self._header["made"]
        self._parts: dict[str, dict[str, str]] = {name: {} for name in self._header["matrices"]}
        self._tensors: dict[str, TensorInfo] = {}
        self._place(file)
        self._given: dict[str, Packed] = {}
        self.order: list[str] | None = self._header.get("order")
        if self.order is not None:
            self._check_order(file, self.order)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """All matrices and vectors by name."""
        return MappingProxyType(self._tensors)

    def load(self, name: str) -> Tensor:
        """A vector, or a matrix unpacked to fp32.

        Raises:
            ModelFileError: no such tensor, or parts that do not belong together.
        """
        if name in self._parts:
            return self.load_packed(name).unpack().detach()
        return self._file.load(name)

    def load_packed(self, name: str) -> Packed:
        """A matrix as it was packed.

        Raises:
            ModelFileError: no such matrix, or parts that do not belong together.
        """
        if name in self._given:
            return self._given[name]
        if name not in self._parts:
            raise ModelFileError(
                f"{self.path.name} has no matrix {shown(name)} among its {len(self._parts)}."
            )
        return self._made(name, {part: self._file.load(key) for part, key in self._parts[name].items()})

    def _made(self, name: str, tensors: Mapping[str, Tensor]) -> Packed:
        entry = self._header["matrices"][name]
        try:
            with torch.no_grad():
                return PACKED_KINDS[entry["kind"]].from_tensors(
                    tuple(entry["shape"]), entry["settings"], tensors
                )
        except ConfigError as error:
            raise damaged(self.path, f"matrix {shown(name)}: {error}") from error

    def stacks(self) -> dict[str, int]:
        """The matrices that are stacks of blocks, and how many each has."""
        return {
            name: len(self._parts[name])
            for name, entry in self._header["matrices"].items()
            if entry["kind"] == BlockStack.kind
        }

    def stack(self, name: str, blocks: Sequence[Tensor]) -> BlockStack:
        """A matrix of the first blocks of a stack; it is what `load_packed` gives from then on.

        Raises:
            ModelFileError: blocks that do not fit the matrix.
        """
        packed = self._made(name, {f"block{index}": block for index, block in enumerate(blocks)})
        assert isinstance(packed, BlockStack)
        self._given[name] = packed
        return packed

    def places(self) -> dict[str, tuple[int, int]]:
        """Where in the file each of its tensors begins, and how long it is."""
        at = 8 + int.from_bytes(file_start(self.file, 8), "little")
        places = {}
        for key, info in self._file.tensors().items():
            places[key] = (at, info.nbytes)
            at += info.nbytes
        return places

    def spec(self, name: str) -> str:
        """The format that a matrix was packed in, as a spec string."""
        return str(self._header["matrices"][name]["spec"])

    def close(self) -> None:
        """Let go of the file; it stays mapped as long as one of its tensors is alive."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_order(self, file: Path, order: Any) -> None:
        """Make sure that the order loads every block of every stack once, and that each block is there."""
        wanted = {name: depth - 1 for name, depth in self.stacks().items()}
        is_list = isinstance(order, list) and all(isinstance(name, str) for name in order)
        if not is_list or Counter(order) != Counter(wanted):
            raise damaged(file, "its order of blocks is not that of its matrices")
        for name, more in wanted.items():
            missing = {f"block{index}" for index in range(more + 1)} ^ self._parts[name].keys()
            if missing:
                raise damaged(file, f"matrix {shown(name)} has no {min(missing)}, or too much")

    def _place(self, file: Path) -> None:
        """Say which matrix each tensor of the file is part of."""
        sizes: dict[str, int] = {}
        for key, info in self._file.tensors().items():
            name, _, part = key.rpartition(".")
            if name in self._parts:
                self._parts[name][part] = key
                sizes[name] = sizes.get(name, 0) + info.nbytes
            elif info.format == "f32" and len(info.shape) == 1:
                self._tensors[key] = info
            else:
                raise damaged(file, f"tensor {shown(key)} is neither a vector nor part of a matrix")
        for name, entry in self._header["matrices"].items():
            if name in self._tensors:
                raise damaged(file, f"{shown(name)} is both a vector and a matrix")
            self._tensors[name] = TensorInfo(
                name, tuple(entry["shape"]), str(entry["spec"]), sizes.get(name, 0)
            )


def write_packed(
    path: Path,
    header: Mapping[str, Any],
    matrices: Mapping[str, Mapping[str, Tensor]],
    vectors: Mapping[str, Tensor],
) -> None:
    """Write such a file in one step: a reader sees the old one or the new one.

    Args:
        header: `config`, `matrices` and `made`, as the top of this file says.
        matrices: the parts of each matrix.
        vectors: one-dimensional tensors; kept in fp32.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    tensors = {f"{name}.{part}": t for name, parts in matrices.items() for part, t in parts.items()}
    tensors |= {name: vector.float() for name, vector in vectors.items()}
    # Blocks of a stack lie as they are loaded, behind all that is always needed.
    count: Counter[str] = Counter()
    stacked: dict[str, int] = {}
    for name in header.get("order") or ():
        count[name] += 1
        stacked[f"{name}.block{count[name]}"] = len(stacked)
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), stacked.get(key, -1)))
    note = json.dumps({"version": VERSION, **header}, separators=(",", ":"), sort_keys=True)
    table: dict[str, Any] = {"__metadata__": {_NOTE: note}}
    end = 0
    for key in order:
        tensor = tensors[key]
        start, end = end, end + tensor.numel() * tensor.element_size()
        table[key] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % _ALIGNMENT)
    with replacing(path) as beside, beside.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for key in order:
            flat = tensors[key].detach().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def _header(file: Path, note: str | None) -> dict[str, Any]:
    """The checked JSON header."""
    if note is None:
        raise damaged(file, f"it has no {_NOTE} in its metadata")
    header = json_object(file, note.encode("utf-8", "surrogatepass"))
    version = header.get("version")
    if version != VERSION:
        raise ModelFileError(
            f"{file.name} has version {version!r:.20} of Plait's packed weights; version {VERSION} is read."
            " Make it again with plait quantize."
        )
    if not all(isinstance(header.get(key), dict) for key in ("config", "matrices", "made")):
        raise damaged(file, "its header has no config, matrices or made")
    for name, entry in header["matrices"].items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        is_shape = (
            isinstance(shape, list)
            and len(shape) == 2
            and all(type(size) is int and size >= 0 for size in shape)
            and math.prod(shape) < 1 << 48
        )
        if (
            not is_shape
            or str(entry.get("kind")) not in PACKED_KINDS
            or not isinstance(entry.get("settings"), dict)
        ):
            raise damaged(file, f"matrix {shown(name)} is not of a known kind and shape")
        entry.setdefault("spec", entry["kind"])
    return header
