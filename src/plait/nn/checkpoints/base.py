"""What every checkpoint reader offers, whatever its file format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from torch import Tensor

from plait.weights import Packed

__all__ = ["Checkpoint", "TensorInfo"]


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint.

    `shape` is in row-major (PyTorch) order; `format` is the name the file uses for the storage,
    in lower case (`"f32"`, `"bf16"`, `"q4_1"`); `nbytes` is its size in the file.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int


class Checkpoint(Protocol):
    """A read-only model file (or folder of files), memory-mapped.

    Tensors returned may share memory with the mapping; they stay valid after `close`.
    """

    path: Path
    metadata: Mapping[str, Any]

    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, in file order."""
        ...

    def load(self, name: str) -> Tensor:
        """The tensor as stored if it is plain floating point, else dequantised to fp32.

        Raises:
            ModelFileError: no such tensor.
        """
        ...

    def load_packed(self, name: str) -> Packed:
        """The two-dimensional tensor in the form it has in the file."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
