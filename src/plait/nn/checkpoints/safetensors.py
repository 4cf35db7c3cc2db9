"""Safetensors checkpoints: one file, or a folder as Hugging Face lays it out.

The safetensors package checks and maps the files; here its errors are translated, headers and JSON
files are bounded, and the index of a sharded model is checked against the shards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType, TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from plait.errors import ModelFileError
from plait.nn.checkpoints.base import TensorInfo
from plait.nn.checkpoints.files import (
    PICKLE_SUFFIXES,
    counted,
    damaged,
    file_start,
    folder_files,
    pickle_error,
    shown,
)
from plait.weights import Dense

__all__ = ["INDEX_NAME", "SINGLE_NAME", "SafetensorsCheckpoint", "json_object"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_CONFIG_NAME = "config.json"

_MAX_HEADER_BYTES = 16 << 20
_MAX_INDEX_BYTES = 32 << 20
_MAX_CONFIG_BYTES = 4 << 20


class SafetensorsCheckpoint:
    """A `.safetensors` file, or a folder with `model.safetensors` or its shards and `config.json`.

    `metadata` is the content of `config.json`. A folder must have one; beside a single file it is
    read when it is there, else `metadata` is empty. In a sharded model the index decides which
    tensors there are and where.

    Tensors share a private mapping of the file and stay valid after `close`; writing to one changes
    memory, never the file.

    Raises:
        ModelFileError: a missing, damaged or hostile file; an index that names a file outside the
            folder or a tensor that its shard does not hold; pickled weights only.
    """

    path: Path
    metadata: Mapping[str, Any]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        is_folder = os.path.isdir(self.path)
        config = (self.path if is_folder else self.path.parent) / _CONFIG_NAME
        shards = _folder_shards(self.path) if is_folder else {self.path: None}
        has_config = is_folder or os.path.exists(config)
        self.metadata = _read_json(config, _MAX_CONFIG_BYTES) if has_config else {}
        self._tensors: dict[str, TensorInfo] = {}
        self._files: dict[str, Any] = {}
        # What each file says about itself, by name of the file.
        self.notes: dict[str, dict[str, str]] = {}
        for file, names in shards.items():
            self._open_shard(file, names)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, in the order of their data, shard after shard."""
        return MappingProxyType(self._tensors)

    def load(self, name: str) -> Tensor:
        """The tensor as stored.

        Raises:
            ModelFileError: no such tensor, or torch has no such type or shape.
        """
        if name not in self._tensors:
            raise ModelFileError(
                f"{self.path.name} has no tensor {shown(name)} among its {len(self._tensors)}."
            )
        if not self._files:
            raise ModelFileError(f"{self.path.name} is closed. Open the checkpoint again to load tensors.")
        try:
            tensor: Tensor = self._files[name].get_tensor(name)
        except (SafetensorError, TypeError, ValueError, RuntimeError) as error:
            info = self._tensors[name]
            raise ModelFileError(
                f"{self.path.name}: tensor {shown(name)}, {info.format} of shape {info.shape},"
                " cannot be held in torch. Convert the model to a floating-point type."
            ) from error
        return tensor

    def load_packed(self, name: str) -> Dense:
        """The two-dimensional tensor as stored.

        Raises:
            ModelFileError: no such tensor, or it is not a matrix.
        """
        tensor = self.load(name)
        if tensor.dim() != 2:
            raise ModelFileError(
                f"{self.path.name}: tensor {shown(name)} has shape {tuple(tensor.shape)};"
                " only a matrix can be loaded packed."
            )
        return Dense(tensor)

    def close(self) -> None:
        """Let go of the files; each stays mapped as long as one of its tensors is alive."""
        self._files = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_shard(self, path: Path, names: list[str] | None) -> None:
        """Add the tensors called `names`, or all of them."""
        infos = _read_header(path)
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise damaged(path, f"it is not a valid safetensors file: {shown(str(error))}") from error
        self.notes[path.name] = file.metadata() or {}  # type: ignore[no-untyped-call]
        wanted = set(infos if names is None else names)
        missing = sorted(wanted - infos.keys())
        if missing:
            raise damaged(path, f"the index puts tensor {shown(missing[0])} here, but it is not in this file")
        for name, info in infos.items():
            if name in wanted:
                self._tensors[name] = info
                self._files[name] = file


def _folder_shards(folder: Path) -> dict[Path, list[str] | None]:
    """The weight files of a folder, each with the names of the tensors to take, or None for all."""
    files = folder_files(folder)
    if SINGLE_NAME in files:
        return {files[SINGLE_NAME]: None}
    index = folder / INDEX_NAME
    if INDEX_NAME not in files:
        pickles = [path for path in files.values() if path.suffix.lower() in PICKLE_SUFFIXES]
        if pickles:
            raise pickle_error(pickles[0])
        raise ModelFileError(
            f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}. Give a folder with a model in it."
        )
    weight_map = _read_json(index, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(index, "it has no weight_map object")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise damaged(
                index, f"tensor {shown(name)} is in {shown(str(shard))}, not a .safetensors file name"
            )
        shards.setdefault(shard, []).append(name)
    return {folder / shard: names for shard, names in sorted(shards.items())}


def _is_plain_name(name: str) -> bool:
    """Whether a name stays inside its folder on every system."""
    return PurePosixPath(name).name == name == PureWindowsPath(name).name and name.endswith(".safetensors")


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """What a safetensors file says about its tensors, in the order of their data.

    The package reads the header as well and checks every range in it; only it decides what is valid.
    """
    start = file_start(path, 8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or start.startswith(b"GGUF"):
        raise damaged(path, "it is not a safetensors file")
    if length > _MAX_HEADER_BYTES:
        raise damaged(path, f"its header claims {counted(length)} bytes, above {_MAX_HEADER_BYTES >> 20} MiB")
    raw = file_start(path, 8 + length)[8:]
    if len(raw) < length:
        raise damaged(path, f"its header claims {length} bytes but the file has {len(raw)} left")
    header = json_object(path, raw)
    header.pop("__metadata__", None)
    try:
        infos = [
            (begin, TensorInfo(name, tuple(entry["shape"]), entry["dtype"].lower(), end - begin))
            for name, entry in header.items()
            for begin, end in [entry["data_offsets"]]
        ]
        return {info.name: info for _, info in sorted(infos)}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, "its header does not describe tensors") from error


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes."""
    raw = file_start(path, limit + 1)
    if len(raw) > limit:
        raise damaged(path, f"it is above the {limit >> 20} MiB that such a file may have")
    return json_object(path, raw)


def json_object(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    # Deep nesting raises RecursionError; everything else that is not JSON raises ValueError.
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"it does not hold valid JSON ({str(error)[:80]})") from error
    if not isinstance(value, dict):
        raise damaged(path, "it holds JSON that is not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Readers differ in which of two equal keys they keep, so a file with two has two meanings.
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key is given twice")
    return result
