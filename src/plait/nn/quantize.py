"""Packing a whole model block by block, in bounded memory, so that a killed run goes on where it was.

A block is read, run on the calibration text while sums over the inputs of its matrices are made, packed, and
written to a file of its own; then the text passes the packed block, and the next block sees what it will see.
At the end the parts become one `plait.safetensors`. In memory at once: one dense block, the second moments of
its inputs, and what the text looks like between two blocks.

Shapes: N tokens of calibration text, W width.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import ConfigError, ModelFileError
from plait.files import remove_leftovers
from plait.memory import Rows
from plait.nn.checkpoints import model_file
from plait.nn.checkpoints.base import Checkpoint
from plait.nn.checkpoints.packed import PACKED_NAME, PackedCheckpoint, write_packed
from plait.nn.config import TransformerConfig
from plait.nn.layers import Norm
from plait.nn.load import describe, has_other_head
from plait.nn.mixers.attention import Attention
from plait.nn.packed_run import PackedRun
from plait.nn.parameters import CheckpointParameters, Entry, Parameters, keep_outer
from plait.nn.transformer import Block, Transformer
from plait.weights import Dense, Linear, Packed, Stacked, Stats, WeightFormat

__all__ = ["Quantized", "Recorder", "quantize_checkpoint"]

# Rows that pass a block at once while sums are made.
_ROWS_AT_ONCE = 2048
# Of the last texts, what is read to find out what each block of a stack is worth.
_SORTED_TEXTS, _SORTED_TOKENS = 4, 256
_OUTER_PART = "outer"


@dataclass(frozen=True)
class Quantized:
    """What a run made.

    Attributes:
        path: the file.
        nbytes: of the file.
        weights: numbers in the matrices of the blocks.
        bits_per_weight: of those, with everything that is kept for them.
        reused: parts that an earlier run had finished.
    """

    path: Path
    nbytes: int
    weights: int
    bits_per_weight: float
    reused: int


@torch.no_grad()
def quantize_checkpoint(
    checkpoint: Checkpoint,
    output: Path,
    format: WeightFormat,
    *,
    head: WeightFormat | None = None,
    calibration: Sequence[Sequence[int]] = (),
    made: Mapping[str, Any] | None = None,
    prepare: Callable[[], None] = lambda: None,
    progress: Callable[[str], None] = lambda line: None,
) -> Quantized:
    """Pack the matrices of every block, and write `plait.safetensors` into a folder.

    Parts that an earlier run with the same arguments left in `output/parts` are taken as they are; the file has
    the same bytes as one made without a stop.

    Args:
        checkpoint: an open checkpoint.
        output: a folder; made if it is not there.
        format: of the matrices of the blocks.
        head: of the embedding and the head; left out, they stay in the codes that they have, or in q8_0.
        calibration: token ids of texts, needed by formats that look at inputs.
        made: further facts for the header, as JSON holds them.
        prepare: puts other files into the folder, once it is known to hold no other model.
        progress: told a line for each part.

    Raises:
        ConfigError: calibration text is needed and missing, a weight or an activation is not finite (the message
            names it), or the format does not fit a matrix.
        ModelFileError: the checkpoint is damaged, or `output` holds another model.
        OSError: the disk is full.
    """
    if format.needs and not any(len(text) for text in calibration):
        raise ConfigError(f"{format} needs calibration text. Give some with --calibration FILE.")
    _, config, entries = describe(checkpoint)
    if config.tied_head and has_other_head(checkpoint, entries):
        config = replace(config, tied_head=False)
    facts = {
        "format": str(format),
        "head": None if head is None else str(head),
        "calibration": _digest(calibration) if format.needs else None,
        **(made or {}),
    }
    job = _Job(checkpoint, entries, config, format, head, Path(output) / "parts", facts)
    job.check(Path(output))
    job.folder.mkdir(parents=True, exist_ok=True)
    prepare()
    shell = job.outer()
    progress(f"embedding and head, {1 + len(config.blocks)} parts in all")
    texts = (
        [torch.as_tensor(text, dtype=torch.int64) for text in calibration if len(text)]
        if format.needs
        else []
    )
    job.texts = [text[:_SORTED_TOKENS] for text in texts[-_SORTED_TEXTS:]]
    streams = [_entered(shell, text) for text in texts]
    for index in range(len(config.blocks)):
        streams, note = job.block(index, streams)
        progress(f"block {index + 1} of {len(config.blocks)}{note}")
    return job.finish(Path(output) / PACKED_NAME)


class _Job:
    """One model, format and text; parts are made, or read where they are there."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        entries: Mapping[str, Entry],
        config: TransformerConfig,
        format: WeightFormat,
        head: WeightFormat | None,
        folder: Path,
        facts: Mapping[str, Any],
    ) -> None:
        self.source = CheckpointParameters(checkpoint, entries, None)
        self.config, self.format, self.head, self.folder = config, format, head, folder
        self.facts = dict(facts)
        self.reused = 0
        self.texts: list[Tensor] = []

    def check(self, output: Path) -> None:
        """Raise `ModelFileError` if a folder holds another model; remove what a killed run left half-written."""
        whole = output / PACKED_NAME
        if model_file(output) not in (None, whole):
            raise ModelFileError(f"{output} holds a model. Choose another output folder.")
        for path in (whole, *map(self._path, self._names())):
            if path.exists():
                self._opened(path)
            remove_leftovers(path)

    def outer(self) -> Transformer:
        """The model without its blocks."""
        shell = replace(self.config, blocks=())
        if (found := self._finished(_OUTER_PART)) is not None:
            return Transformer(shell, found).eval()
        recorder = Recorder(self.source, self._outer_form)
        model = Transformer(shell, recorder).eval()
        self._write(_OUTER_PART, recorder.forms(), recorder.vectors, str(self.head) if self.head else "")
        return model

    def _outer_form(self, name: str, packed: Packed) -> Packed:
        if self.head is None:
            return keep_outer(packed)
        return _named(name, lambda: self.head.pack(packed.unpack().float()) if self.head else packed)

    def block(self, index: int, streams: list[Tensor]) -> tuple[list[Tensor], str]:
        """Pack one block; what the texts look like behind it, and a note for the user."""
        name, config = f"blocks.{index}", self.config
        if (found := self._finished(name)) is not None:
            block = Block(config.blocks[index], config.width, config.norm, found.under(name)).eval()
            return list(_outputs(block, streams)), ", made before"
        recorder = Recorder(self.source, lambda _, packed: Dense(packed.unpack().float()))
        block = Block(config.blocks[index], config.width, config.norm, recorder.under(name)).eval()
        linears = recorder.linears(block)
        stats: dict[Linear, Stats] = {}
        targets: list[Tensor] = []
        if streams:
            stats = {linear: Stats(linear.weight.shape[1], self.format.needs) for linear in linears}
            targets = _measured(block, streams, stats, linears)
            self._fold_factors(block, stats)
        for linear, names in linears.items():
            _pack_linear(linear, names, self.format, stats.get(linear))
        if "block_io" in self.format.needs:
            self.format.refine(block, _Run(block, streams, targets))
        matrices = {
            name: piece
            for linear, names in linears.items()
            for name, piece in zip(names, linear.weight.pieces(), strict=True)
        }
        self._write(name, matrices, recorder.vectors, str(self.format))
        return list(_outputs(block, streams)), ""

    def _fold_factors(self, block: Block, stats: dict[Linear, Stats]) -> None:
        """Multiply columns by what the format asks for, and divide what makes their inputs."""
        for linear, divide in _feeders(block).items():
            dense = [piece.unpack().detach() for piece in linear.weight.pieces()]
            factors = self.format.input_factors(dense, stats[linear])
            if factors is None:
                continue
            for piece in linear.weight.pieces():
                assert isinstance(piece, Dense)
                piece.weight.mul_(factors)
            divide(factors)
            stats[linear] = stats[linear].divided(factors)

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"

    def _finished(self, part: str) -> Parameters | None:
        """The parameters of a part that was written before with the same arguments."""
        path = self._path(part)
        if not path.exists():
            return None
        found = self._opened(path)
        self.reused += 1
        return CheckpointParameters(found, {name: Entry(name) for name in found.tensors()}, None)

    def _opened(self, path: Path) -> PackedCheckpoint:
        found = PackedCheckpoint(path)
        if found.made != self.facts or found.config != self.config.to_json():
            raise ModelFileError(
                f"{path} was made from another model or with other settings. Choose another output folder, or "
                f"remove {path.parent}."
            )
        return found

    def _names(self) -> list[str]:
        return [_OUTER_PART, *(f"blocks.{index}" for index in range(len(self.config.blocks)))]

    def _write(
        self, part: str, matrices: Mapping[str, Packed], vectors: Mapping[str, Tensor], spec: str
    ) -> None:
        entries = {
            name: {
                "kind": packed.kind,
                "shape": list(packed.shape),
                "settings": packed.settings(),
                "spec": spec or packed.format,
            }
            for name, packed in matrices.items()
        }
        header = {"config": self.config.to_json(), "matrices": entries, "made": self.facts}
        parts = {name: packed.tensors() for name, packed in matrices.items()}
        write_packed(self._path(part), header, parts, vectors)

    def finish(self, path: Path) -> Quantized:
        """Join the parts into one file, and remove them."""
        names = self._names()
        entries: dict[str, Any] = {}
        matrices: dict[str, dict[str, Tensor]] = {}
        vectors: dict[str, Tensor] = {}
        weights = nbytes = 0
        for part in names:
            found = PackedCheckpoint(self._path(part))
            for name, info in found.tensors().items():
                if len(info.shape) == 1:
                    vectors[name] = found.load(name)
                    continue
                packed = found.load_packed(name)
                matrices[name] = packed.tensors()
                entries[name] = {
                    "kind": packed.kind,
                    "shape": list(packed.shape),
                    "settings": packed.settings(),
                    "spec": found.spec(name),
                }
                if part != _OUTER_PART:
                    weights += packed.shape[0] * packed.shape[1]
                    nbytes += packed.nbytes()
        header: dict[str, Any] = {"config": self.config.to_json(), "matrices": entries, "made": self.facts}
        order = self.format.stack_order(PackedRun(self.outer(), self._packed_blocks, self.texts))
        if order is not None:
            header["order"] = order
        write_packed(path, header, matrices, vectors)
        for part in names:
            self._path(part).unlink()
        # It may hold files that are not ours.
        with contextlib.suppress(OSError):
            self.folder.rmdir()
        return Quantized(path, path.stat().st_size, weights, 8 * nbytes / max(1, weights), self.reused)

    def _packed_blocks(self) -> tuple[list[Block], dict[Linear, list[str]]]:
        """All blocks as they were packed, and the names of what each of their linear layers is made of."""
        blocks: list[Block] = []
        linears: dict[Linear, list[str]] = {}
        for index, config in enumerate(self.config.blocks):
            name = f"blocks.{index}"
            found = PackedCheckpoint(self._path(name))
            source = CheckpointParameters(found, {key: Entry(key) for key in found.tensors()}, None)
            recorder = Recorder(source, lambda _, packed: packed)
            blocks.append(Block(config, self.config.width, self.config.norm, recorder.under(name)).eval())
            linears |= recorder.linears(blocks[-1])
        return blocks, linears


class Recorder(Parameters):
    """Hands on parameters, keeps the parts of a matrix apart, and remembers the name of each.

    Args:
        source: where they come from.
        form: makes of a matrix, by its name, what the model gets.

    Attributes:
        vectors: by name; the very numbers that the model has, so a change of one is a change of both.
    """

    def __init__(self, source: CheckpointParameters, form: Callable[[str, Packed], Packed]) -> None:
        self.source, self.form = source, form
        self.names: dict[int, list[str]] = {}
        self.vectors: dict[str, Tensor] = {}
        self._made: list[tuple[list[str], Packed]] = []

    def matrix(self, names: Sequence[str], columns: int, rows: Sequence[int]) -> Packed:
        read = self.source.matrix(names, columns, rows)
        parts = [self.form(name, piece) for name, piece in zip(names, read.pieces(), strict=True)]
        packed = parts[0] if len(parts) == 1 else Stacked(parts)
        self.names[id(packed)] = list(names)
        self._made.append((list(names), packed))
        return packed

    def vector(self, names: Sequence[str], sizes: Sequence[int]) -> Tensor:
        # A copy, as factors are folded into it where it is.
        whole = self.source.vector(names, sizes).clone()
        self.vectors |= dict(zip(names, whole.split(list(sizes)), strict=True))
        return whole

    def linears(self, block: Block) -> dict[Linear, list[str]]:
        """The linear layers of a block, and the names of what each is made of."""
        return {linear: self.names[id(linear.weight)] for linear in _linears(block)}

    def forms(self) -> dict[str, Packed]:
        """Every matrix by name."""
        return {
            name: piece
            for names, packed in self._made
            for name, piece in zip(names, packed.pieces(), strict=True)
        }


@dataclass(frozen=True)
class _Run:
    """A `plait.weights.BlockRun` over texts that are held in memory."""

    block: Block
    streams: Sequence[Tensor]
    targets: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.streams)

    def output(self, index: int) -> Tensor:
        stream = self.streams[index]
        return self.block(stream, Rows([(len(stream), 0)]), None)

    def target(self, index: int) -> Tensor:
        return self.targets[index]


def _entered(shell: Transformer, text: Tensor) -> Tensor:
    """What a text looks like in front of the first block, (N, W)."""
    return shell.enter(shell.embed(text), Rows([(len(text), 0)]))


def _outputs(block: Block, streams: Sequence[Tensor]) -> Iterator[Tensor]:
    """The texts behind a block; some pass it together."""
    batch: list[Tensor] = []
    for stream in [*streams, None]:
        if batch and (stream is None or sum(map(len, batch)) + len(stream) > _ROWS_AT_ONCE):
            rows = Rows([(len(text), 0) for text in batch])
            yield from block(torch.cat(batch), rows, None).split([len(text) for text in batch])
            batch = []
        if stream is not None:
            batch.append(stream)


def _measured(
    block: Block,
    streams: Sequence[Tensor],
    stats: Mapping[Linear, Stats],
    linears: Mapping[Linear, list[str]],
) -> list[Tensor]:
    """The texts behind a block, while the inputs of its linear layers are added up."""

    def add(linear: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(linear, Linear)
        _named(linears[linear][0], lambda: stats[linear].add(given[0]))

    hooks = [linear.register_forward_pre_hook(add) for linear in stats]
    try:
        return list(_outputs(block, streams))
    finally:
        for hook in hooks:
            hook.remove()


def _linears(block: Block) -> list[Linear]:
    return [module for module in block.modules() if isinstance(module, Linear)]


def _pack_linear(linear: Linear, names: Sequence[str], format: WeightFormat, stats: Stats | None) -> None:
    """Pack the parts of a linear layer, each by itself, in place."""
    parts: list[Packed] = []
    for name, piece in zip(names, linear.weight.pieces(), strict=True):
        assert isinstance(piece, Dense)
        weight = piece.weight.detach()
        if not torch.isfinite(weight).all():
            raise ConfigError(f"{name} has NaN or infinite weights. The model is damaged.")
        parts.append(_named(name, partial(format.pack, weight, stats)))
    linear.weight = parts[0] if len(parts) == 1 else Stacked(parts)


def _named(name: str, call: Callable[[], Any]) -> Any:
    """Call, and say in an error which matrix it is about."""
    try:
        return call()
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _feeders(block: Block) -> dict[Linear, Callable[[Tensor], None]]:
    """For each linear layer whose inputs can be divided where they are made: how to divide them."""
    feeders: dict[Linear, Callable[[Tensor], None]] = {}
    mixer, feed_forward = block.mixer, block.feed_forward
    if isinstance(mixer, Attention) and isinstance(block.mixer_norm, Norm):
        feeders[mixer.qkv] = lambda factors: _divide_norm(block.mixer_norm, factors)
    if isinstance(block.feed_forward_norm, Norm):
        feeders[feed_forward.up] = lambda factors: _divide_norm(block.feed_forward_norm, factors)
    if feed_forward.config.gated:
        feeders[feed_forward.down] = lambda factors: _divide_rows(feed_forward.up, factors)
    return feeders


def _divide_norm(norm: nn.Module, factors: Tensor) -> None:
    assert isinstance(norm, Norm)
    for vector in (norm.weight, norm.bias):
        if vector is not None:
            vector.div_(factors)


def _divide_rows(linear: Linear, factors: Tensor) -> None:
    """Divide the outputs of the last part of a linear layer: those that a gate is multiplied with."""
    last = linear.weight.pieces()[-1]
    assert isinstance(last, Dense)
    last.weight.div_(factors[:, None])
    if linear.bias is not None:
        linear.bias[-len(factors) :].div_(factors)


def _digest(texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What was read for calibration: how much, and a fingerprint of the ids."""
    raw = json.dumps([[int(token) for token in text] for text in texts]).encode()
    return {
        "tokens": sum(len(text) for text in texts),
        "texts": len(texts),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
