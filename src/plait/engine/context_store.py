"""Contexts that were read once, kept in memory and in files for any later session of the same model."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from plait.errors import ConfigError, IncompatibleError
from plait.files import write_bytes
from plait.memory import FrozenStrand, Heads, Strand, allocated_bytes
from plait.nn import Transformer
from plait.weights import Packed

__all__ = ["Context", "ContextKey", "ContextStore", "fingerprint"]


class ContextKey(NamedTuple):
    """What the keys and values of a context depend on.

    Attributes:
        model: digest of the model's configuration and parameters.
        memory: the plan of the memory, as text.
        prefix, context: token ids.
    """

    model: str
    memory: str
    prefix: tuple[int, ...]
    context: tuple[int, ...]

    @property
    def digest(self) -> str:
        """A name for files; contents are compared, never the name alone."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()


class Context(NamedTuple):
    """The strands of a context, layer by layer."""

    layers: list[list[Strand]]

    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return allocated_bytes(strand for layer in self.layers for strand in layer)


class ContextStore:
    """Contexts that were read once, for any later session of the same model.

    Found by the tokens of prefix and context, the model's parameters and its memory, all of which must be
    equal. What was used longest ago is dropped first.

    Args:
        max_bytes: most bytes of contexts in memory, and of files in `folder`.
        folder: where contexts are also kept as safetensors files, for later processes; None for memory only.
            Only contexts that are stored as plain numbers can be written.

    Attributes:
        hits, misses: contexts that were found and not found.
        damaged: files that did not hold what their name and checksum promised; they were deleted.
    """

    def __init__(self, *, max_bytes: int = 1 << 30, folder: str | Path | None = None) -> None:
        if max_bytes < 0:
            raise ConfigError(f"ContextStore.max_bytes must be from 0 on. Got {max_bytes}.")
        self.max_bytes = max_bytes
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.hits = self.misses = self.damaged = 0
        self._held: OrderedDict[ContextKey, Context] = OrderedDict()

    def __len__(self) -> int:
        """Contexts in memory."""
        return len(self._held)

    def nbytes(self) -> int:
        """Bytes of contexts in memory."""
        return sum(context.nbytes() for context in self._held.values())

    def get(self, key: ContextKey, heads: Sequence[Heads]) -> Context | None:
        """The context, or None.

        Args:
            heads: geometry of each layer.
        """
        context = self._held.get(key) or self._from_file(key, heads)
        if context is None:
            self.misses += 1
            return None
        self.hits += 1
        self._hold(key, context)
        return context

    def put(self, key: ContextKey, context: Context) -> None:
        """Keep a context; it shares storage with the store.

        Raises:
            IncompatibleError: there is a folder, and the codec's strands are not plain numbers.
            OSError: the file cannot be written; nothing is kept then.
        """
        if self.folder is not None:
            data = _to_bytes(key, context)
            if len(data) <= self.max_bytes:
                write_bytes(self._path(key), data)
                self._drop_old_files(self.folder)
        self._hold(key, context)

    def clear(self) -> None:
        """Forget everything, files included."""
        self._held.clear()
        for path in self._files():
            path.unlink(missing_ok=True)

    def _hold(self, key: ContextKey, context: Context) -> None:
        self._held[key] = context
        self._held.move_to_end(key)
        total = self.nbytes()
        while total > self.max_bytes:
            total -= self._held.popitem(last=False)[1].nbytes()

    def _path(self, key: ContextKey) -> Path:
        assert self.folder is not None
        return self.folder / f"{key.digest}.safetensors"

    def _files(self) -> list[Path]:
        return [] if self.folder is None else sorted(self.folder.glob("*.safetensors"))

    def _from_file(self, key: ContextKey, heads: Sequence[Heads]) -> Context | None:
        if self.folder is None or not self._path(key).exists():
            return None
        context = _from_file(self._path(key), key, heads)
        if context is None:
            self.damaged += 1
            self._path(key).unlink(missing_ok=True)
        else:
            os.utime(self._path(key))
        return context

    def _drop_old_files(self, folder: Path) -> None:
        sizes = [(path.stat().st_mtime_ns, path.stat().st_size, path) for path in self._files()]
        total = sum(size for _, size, _ in sizes)
        for _, size, path in sorted(sizes):
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


# Rows of a matrix that are unpacked at a time.
_ROWS_AT_ONCE = 1024
_FINGERPRINTS: weakref.WeakKeyDictionary[Transformer, str] = weakref.WeakKeyDictionary()


def fingerprint(model: Transformer) -> str:
    """Digest of a model's configuration and of every parameter; formed once for each loaded model."""
    if model not in _FINGERPRINTS:
        digest = hashlib.sha256(repr(model.config).encode())
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            _add(digest, name, tensor)
        for name, module in model.named_modules():
            if isinstance(module, Packed) and module.native is not None:
                # Its tensors gave way to the native form, so the numbers themselves are read.
                for start in range(0, module.shape[0], _ROWS_AT_ONCE):
                    rows = slice(start, start + _ROWS_AT_ONCE)
                    _add(digest, f"{name}.{module.format}.{start}", module.unpack_rows(rows))
        _FINGERPRINTS[model] = digest.hexdigest()
    return _FINGERPRINTS[model]


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _add(digest, name, tensors[name])
    return digest.hexdigest()


def _to_bytes(key: ContextKey, context: Context) -> bytes:
    """A safetensors file: keys and values of every strand, tokens, and a checksum over all of it."""
    from safetensors.torch import save

    tensors = {
        "prefix": torch.tensor(key.prefix, dtype=torch.int64),
        "context": torch.tensor(key.context, dtype=torch.int64),
    }
    for layer, strands in enumerate(context.layers):
        for place, strand in enumerate(strands):
            if type(strand) is not FrozenStrand:
                raise IncompatibleError(
                    f"A ContextStore with a folder keeps plain numbers, and {key.memory} makes a "
                    f"{type(strand).__name__}. Use a store without a folder, or memory='dense'."
                )
            tensors[f"{layer}.{place}.keys"] = strand.keys.contiguous()
            tensors[f"{layer}.{place}.values"] = strand.values.contiguous()
            tensors[f"{layer}.{place}.frame"] = torch.tensor([strand.offset, strand.start])
    metadata = {"model": key.model, "memory": key.memory, "checksum": _checksum(tensors)}
    return save(tensors, metadata)


def _from_file(path: Path, key: ContextKey, heads: Sequence[Heads]) -> Context | None:
    """The context in a file; None if the file is damaged or holds another one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            with torch.inference_mode(False):
                names: list[str] = file.keys()
                tensors = {name: file.get_tensor(name).clone() for name in names}
        if metadata.get("checksum") != _checksum(tensors):
            return None
        if (
            ContextKey(
                metadata["model"],
                metadata["memory"],
                tuple(tensors["prefix"].tolist()),
                tuple(tensors["context"].tolist()),
            )
            != key
        ):
            return None
        layers: list[list[Strand]] = []
        for layer, of_layer in enumerate(heads):
            strands: list[Strand] = []
            while f"{layer}.{len(strands)}.keys" in tensors:
                name = f"{layer}.{len(strands)}"
                offset, start = tensors[f"{name}.frame"].tolist()
                strands.append(
                    FrozenStrand(
                        of_layer,
                        tensors[f"{name}.keys"],
                        tensors[f"{name}.values"],
                        offset=offset,
                        start=start,
                    )
                )
            layers.append(strands)
        return Context(layers)
    except (SafetensorError, KeyError, ValueError, OSError):
        return None
