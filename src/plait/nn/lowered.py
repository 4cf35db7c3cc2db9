"""A transformer lowered to one native program: all layers of a packed batch in a single call.

Shapes: N packed rows, W width, V vocabulary, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import ConfigError, IncompatibleError
from plait.memory import Memory, Past, Rows
from plait.memory.strand import DenseStrand
from plait.nn.layers import FeedForward, Norm
from plait.nn.mixers.attention import Attention
from plait.nn.transformer import Block, Transformer
from plait.ops import Causal, Everything, Mask, Rope, Tree, native
from plait.ops.native import ACTIVATIONS, NUMBERS, PackedMatrix, Projection, tree_bits
from plait.weights import Linear, Packed, Stacked
from plait.weights.ggml import Blocks

__all__ = ["Lowered", "obstacle"]

_MASKS: dict[type[Mask], int] = {Everything: 0, Causal: 1, Tree: 2}


def obstacle(model: Transformer) -> str | None:
    """Why this model cannot be lowered, as the end of a sentence; None when it can."""
    if native.module() is None:
        return "the native operations are not available"
    config = model.config
    if config.learned_positions or model.project_in is not None:
        return "it has learned positions or projected embeddings"
    if config.norm.kind != "rms":
        return "its norms are not RMS norms"
    inner: set[tuple[int, int]] = set()
    for block in _blocks(model):
        mixer, feed_forward = block.mixer, block.feed_forward
        if not isinstance(mixer, Attention) or block.norms == "post":
            return "it has blocks other than pre-normalised attention"
        if feed_forward.config.size % 32 or config.width % 32 or mixer.config.head_dim > 1024:
            return "its widths are not multiples of 32, or its heads are too wide"
        inner.add((feed_forward.config.size, mixer.config.num_heads * mixer.config.head_dim))
        for linear in (mixer.qkv, mixer.output, feed_forward.up, feed_forward.down):
            if not all(_has_native_form(part) for part in _parts(linear.weight)):
                return f"a matrix in {linear.weight.format} has no native form"
    if len(inner) != 1:
        return "its layers differ in their widths"
    if not all(_has_native_form(part) for part in _parts(model.head.weight)):
        return f"its output head in {model.head.weight.format} has no native form"
    return None


class Lowered:
    """A program made once from a model. Calls change the pasts as `Transformer.forward` does.

    Packed matrices are kept once more, in native form.

    Args:
        model: not trained afterwards; a later change of its parameters is not seen.

    Raises:
        IncompatibleError: the model has a part without a native form; the message names it.
    """

    def __init__(self, model: Transformer) -> None:
        reason = obstacle(model)
        if reason is not None:
            raise IncompatibleError(
                f"This {model.config.family} model cannot run as a native program: {reason}."
            )
        self.model = model
        self.width = model.config.width
        self._matrices: dict[Blocks, PackedMatrix] = {}
        head = self._projection(model.head)
        self._head_rows = head.shape[0]
        self._embedding = model.embedding.weight
        final = model.norm.weight if isinstance(model.norm, Norm) else None
        extension: Any = native.module()
        self._program = extension.Program(self.width, model.config.norm.epsilon, _plain(final), head.handle)
        self._ropes: list[Rope | None] = []
        for block in _blocks(model):
            self._add(block)

    def __call__(
        self,
        tokens: Tensor | None,
        rows: Rows,
        pasts: Sequence[Past],
        *,
        embeddings: Tensor | None = None,
        logit_rows: Tensor | None = None,
        want_logits: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden rows, normalised for the head, and their logits.

        Args:
            tokens: (N,) int64 ids; None when `embeddings` (N, W) is given.
            rows: which segment and position each row belongs to.
            pasts: what each segment remembers; the rows are added to it as pending.
            logit_rows: (R,) int64, the rows to answer for; all when left out.
            want_logits: False for hidden rows only.

        Returns:
            `(R, W)` and `(R, V)` fp32.

        Raises:
            ConfigError: an id is outside the vocabulary.
            IncompatibleError: a past with strands other than dense ones on the CPU, or an unknown mask.
        """
        x = self._embed(tokens) if embeddings is None else embeddings.detach().float().clone()
        segments, trees = _segments(rows)
        tables = _Tables(rows)
        targets: list[int] = []
        visits: list[int] = []
        for layer, rope in enumerate(self._ropes):
            memories = [past.layers[layer] for past in pasts]
            key_table = tables.index(rope, [_memory(memory).tail.offset for memory in memories])
            for index, (segment, memory) in enumerate(zip(rows.segments, memories, strict=True)):
                memory = _memory(memory)
                targets += _reserve(memory, segment.length)
                targets.append(key_table)
                for visit in memory.plan.policy.visits(memory, segment):
                    strand = _dense(visit.strand)
                    table = tables.index(rope, [strand.offset] * len(memories))
                    visits += (layer, index, *_storage(strand), strand.length, NUMBERS[strand.keys.dtype])
                    visits += (strand.position, visit.window or 0, table)
        chosen = torch.arange(len(rows)) if logit_rows is None else logit_rows.to(torch.int64)
        hidden = torch.empty(len(chosen), self.width)
        logits = torch.empty(len(chosen), self._head_rows) if want_logits else None
        self._program.run(
            x.contiguous(), segments, tables.angles, torch.tensor(targets, dtype=torch.int64).view(-1, 10),
            torch.tensor(visits, dtype=torch.int64).view(-1, 13), trees, chosen.view(-1, 1), hidden, logits,
        )  # fmt: skip
        return hidden, None if logits is None else self._finish(logits)

    def _finish(self, logits: Tensor) -> Tensor:
        config = self.model.config
        if config.logit_scale != 1.0:
            logits *= config.logit_scale
        if config.logit_softcap is not None:
            logits = config.logit_softcap * torch.tanh(logits / config.logit_softcap)
        return logits

    def _embed(self, tokens: Tensor | None) -> Tensor:
        if tokens is None:
            raise ConfigError("A native program needs tokens or embeddings. Got neither.")
        matrix = self._matrices.get(self._embedding) if isinstance(self._embedding, Blocks) else None
        if matrix is None:
            return self.model.embed(tokens)
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < matrix.shape[0]:
            return self.model.embed(tokens)  # which names the wrong id
        x = matrix.unpack_rows(tokens)
        scale = self.model.config.embedding_scale
        return x if scale == 1.0 else x * scale

    def _add(self, block: Block) -> None:
        mixer, feed_forward = block.mixer, block.feed_forward
        assert isinstance(mixer, Attention)
        config = mixer.config
        gate, up = self._gate_and_up(feed_forward)
        self._program.add_layer(
            epsilon=self.model.config.norm.epsilon,
            mixer_norm=_norm(block.mixer_norm),
            feed_forward_norm=_norm(block.feed_forward_norm),
            mixer_output_norm=_norm(block.mixer_output_norm),
            feed_forward_output_norm=_norm(block.feed_forward_output_norm),
            query_norm=_norm(mixer.query_norm),
            key_norm=_norm(mixer.key_norm),
            query_key_value=self._projection(mixer.qkv).handle,
            output=self._projection(mixer.output).handle,
            gate=None if gate is None else gate.handle,
            up=up.handle,
            activation=ACTIVATIONS[feed_forward.config.activation],
            down=self._projection(feed_forward.down).handle,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=mixer.heads.scale,
            softcap=mixer.heads.softcap or 0.0,
        )
        self._ropes.append(mixer.heads.rope)

    def _matrix(self, part: Packed) -> PackedMatrix:
        assert isinstance(part, Blocks)
        if part not in self._matrices:
            self._matrices[part] = PackedMatrix(part.blocks, part.format)
        return self._matrices[part]

    def _projection(self, linear: Linear) -> Projection:
        return Projection([self._matrix(part) for part in _parts(linear.weight)], linear.bias)

    def _gate_and_up(self, feed_forward: FeedForward) -> tuple[Projection | None, Projection]:
        size, linear = feed_forward.config.size, feed_forward.up
        if not feed_forward.config.gated:
            return None, self._projection(linear)
        parts = [self._matrix(part) for part in _parts(linear.weight)]
        first, second = (parts[0], 0), (parts[1], 0) if len(parts) == 2 else (parts[0], size)
        biases = [None, None] if linear.bias is None else list(linear.bias.detach().split(size))
        gate, up = (
            Projection([(matrix, start, size)], bias)
            for (matrix, start), bias in zip((first, second), biases, strict=True)
        )
        return gate, up


class _Tables:
    """The tables of angles of one call, each made once."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.angles: list[tuple[Tensor, Tensor]] = []
        self.known: dict[tuple[Rope, tuple[int, ...]], int] = {}

    def index(self, rope: Rope | None, offsets: list[int]) -> int:
        if rope is None:
            return -1
        key = (rope, tuple(offsets))
        if key not in self.known:
            self.known[key] = len(self.angles)
            angles = self.rows.angles(rope, offsets)
            self.angles.append((angles.cos.contiguous(), angles.sin.contiguous()))
        return self.known[key]


def _segments(rows: Rows) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]]]:
    table, trees = [], []
    for index, segment in enumerate(rows.segments):
        kind = _MASKS.get(type(segment.mask))
        if kind is None:
            raise IncompatibleError(
                f"A native program knows causal, full and tree masks. Got {type(segment.mask).__name__}."
            )
        if isinstance(segment.mask, Tree):
            depths = segment.mask.depths(segment.length)
            trees.append((index, depths.contiguous(), tree_bits(segment.mask)))
        table.append((segment.start, segment.length, segment.position, kind))
    return torch.tensor(table, dtype=torch.int64).view(-1, 4), trees


def _memory(memory: object) -> Memory:
    if not isinstance(memory, Memory):
        raise IncompatibleError(f"A native program remembers in strands. Got {type(memory).__name__}.")
    return memory


def _dense(strand: object) -> DenseStrand:
    if not isinstance(strand, DenseStrand) or strand.keys.device.type != "cpu":
        raise IncompatibleError(
            f"A native program reads dense strands on the CPU. Got {type(strand).__name__}; use memory='full'."
        )
    return strand


def _storage(strand: DenseStrand) -> tuple[int, int, int, int, int, int]:
    keys, values = strand.keys, strand.values
    return (
        keys.data_ptr(),
        values.data_ptr(),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
    )


def _reserve(memory: Memory, count: int) -> tuple[int, ...]:
    """Make room for rows behind the tail, count them as pending, and say where they go."""
    tail = _dense(memory.tail)
    at = tail.length
    tail._reserve(at + count)
    tail.length = at + count
    memory.pending += count
    return (*_storage(tail), tail._keys.shape[1], at, NUMBERS[tail.keys.dtype])


def _blocks(model: Transformer) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def _parts(weight: Packed) -> list[Packed]:
    return (
        [part for part in weight.parts if isinstance(part, Packed)]
        if isinstance(weight, Stacked)
        else [weight]
    )


def _has_native_form(part: Packed) -> bool:
    return isinstance(part, Blocks) and part.format not in ("f32", "f16", "bf16")


def _norm(norm: nn.Module | None) -> Tensor | None:
    return _plain(norm.weight) if isinstance(norm, Norm) else None


def _plain(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach().float().contiguous()
