"""Model files: one interface over GGUF files and safetensors folders."""

from __future__ import annotations

import os
from pathlib import Path

from plait.errors import ModelFileError
from plait.nn.checkpoints.base import Checkpoint, TensorInfo
from plait.nn.checkpoints.files import GGUF_MAGIC, file_start, folder_files
from plait.nn.checkpoints.gguf import GGUFCheckpoint
from plait.nn.checkpoints.packed import PACKED_NAME, TEXT_NAME, PackedCheckpoint
from plait.nn.checkpoints.safetensors import INDEX_NAME, SINGLE_NAME, SafetensorsCheckpoint

__all__ = [
    "Checkpoint",
    "GGUFCheckpoint",
    "PackedCheckpoint",
    "SafetensorsCheckpoint",
    "TensorInfo",
    "model_file",
    "open_checkpoint",
]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model by what is on disk.

    Args:
        path: a GGUF file or a safetensors file, told apart by their first bytes; or a folder with
            `plait.safetensors`, or else with safetensors weights, or else with exactly one GGUF file.

    Raises:
        ModelFileError: nothing there, a damaged or hostile file, or a kind that is not loaded; pickled
            weights (`pytorch_model.bin`, `.pt`, `.pth`, `.ckpt`, `.pkl`) are always refused.
    """
    path = Path(path)
    if os.path.isdir(path):
        return _open_folder(path)
    start = file_start(path)
    if start.startswith(GGUF_MAGIC):
        return GGUFCheckpoint(path)
    # A safetensors file is an 8-byte length and a JSON object.
    if start[8:9] == b"{":
        if path.name == PACKED_NAME:
            return PackedCheckpoint(path.parent)
        return SafetensorsCheckpoint(path)
    raise ModelFileError(f"{path} is neither a GGUF nor a safetensors file. Give the path of a model.")


def model_file(folder: Path) -> Path | None:
    """What makes a folder one that holds a model, which nothing else may be written over; None if nothing does."""
    files = folder_files(folder) if folder.is_dir() else {}
    ggufs = [name for name in files if name.endswith(".gguf") and name != TEXT_NAME]
    names = ("config.json", SINGLE_NAME, INDEX_NAME, *ggufs, PACKED_NAME)
    return next((files[name] for name in names if name in files), None)


def _open_folder(folder: Path) -> Checkpoint:
    files = folder_files(folder)
    if PACKED_NAME in files:
        return PackedCheckpoint(folder)
    ggufs = [path for path in files.values() if path.suffix == ".gguf"]
    if not ggufs or SINGLE_NAME in files or INDEX_NAME in files:
        return SafetensorsCheckpoint(folder)
    if len(ggufs) > 1:
        names = ", ".join(file.name for file in ggufs[:4])
        raise ModelFileError(f"{folder} has {len(ggufs)} GGUF files ({names}). Give the path of one of them.")
    return GGUFCheckpoint(ggufs[0])
