"""A transformer lowered to one native program: all layers of a packed batch in a single call.

Shapes: N packed rows, W width, V vocabulary, S segments.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from plait.errors import ConfigError, IncompatibleError
from plait.memory import Heads, Memory, Past, Rows, Seen, Strand, check_pasts
from plait.nn.adapters import Adapter
from plait.nn.config import TransformerConfig
from plait.nn.layers import FeedForward, Norm
from plait.nn.mixers.attention import Attention, AttentionConfig
from plait.nn.past_tables import Frame, PastTables
from plait.nn.transformer import Block, Transformer
from plait.ops import Causal, Everything, Mask, Tree, native
from plait.ops.distance_bias import Schedule
from plait.ops.native import ACTIVATIONS, Projection, tree_bits
from plait.weights import Linear

__all__ = ["Lowered", "lower", "obstacle"]

_Numbers = npt.NDArray[np.int64]

_MASKS: dict[type[Mask], int] = {Everything: 0, Causal: 1, Tree: 2}
# Stands for an adapter that the program cannot compute.
_NONE = object()


def lower(model: Transformer) -> bool:
    """Let a model compute as one native program, where it can; its matrices are then in native form only.

    Returns:
        Whether the model has such a program.
    """
    if obstacle(model) is not None:
        return False
    model.program = Lowered(model)
    return True


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
    biases: set[tuple[Schedule, int | None]] = set()
    linears = [model.head]
    for block in _blocks(model):
        mixer, feed_forward = block.mixer, block.feed_forward
        if not isinstance(mixer, Attention) or block.norms == "post":
            return "it has blocks other than pre-normalised attention"
        if mixer.heads.bias is not None:
            biases.add((mixer.heads.bias.schedule, mixer.heads.bias.limit))
        if feed_forward.config.size % 32 or config.width % 32 or mixer.config.head_dim > 1024:
            return "its widths are not multiples of 32, or its heads are too wide"
        inner.add((feed_forward.config.size, mixer.config.num_heads * mixer.config.head_dim))
        linears += [mixer.qkv, mixer.output, feed_forward.up, feed_forward.down]
    if len(inner) != 1:
        return "its layers differ in their widths"
    if len(biases) > 1:
        return "its layers differ in the kind of their biases by distance"
    for matrix in (model.embedding.weight, *(linear.weight for linear in linears)):
        if not all(part.has_native_form for part in matrix.pieces()):
            return f"a matrix in {matrix.format} has no native form"
    return None


class Lowered:
    """A program made once from a model. Calls change the pasts as `Transformer.forward` does.

    Args:
        model: its matrices are brought into native form; a later change of its parameters is not seen.

    Raises:
        IncompatibleError: the model has a part without a native form; the message names it.
    """

    def __init__(self, model: Transformer) -> None:
        reason = obstacle(model)
        if reason is not None:
            raise IncompatibleError(
                f"This {model.config.family} model cannot run as a native program: {reason}."
            )
        self.config = model.config
        self.embed, self.finish = model.embed, model.finish
        self.head_rows = model.head.weight.shape[0]
        for part in model.embedding.weight.pieces():
            part.to_native()
        final = model.norm.weight if isinstance(model.norm, Norm) else None
        self._program = native.program(
            model.config.width, model.config.norm.epsilon, _plain(final), _projection(model.head).handle
        )
        # Of the last call: visits to chunks of strands that were not made, because another sequence's was theirs.
        self.saved_visits = 0
        self._heads: list[Heads] = []
        # What biases by distance take off scores, of distances in both directions.
        self._growth: Tensor | None = None
        self._past_tables: WeakKeyDictionary[Past, PastTables] = WeakKeyDictionary()
        for block in _blocks(model):
            self._add(block)

    def of(self, model: Transformer) -> Lowered:
        return Lowered(model)

    def __call__(
        self,
        tokens: Tensor | None,
        rows: Rows,
        pasts: Sequence[Past],
        *,
        embeddings: Tensor | None = None,
        wanted: Tensor | None = None,
        with_logits: bool = False,
    ) -> tuple[Tensor, Tensor | None] | None:
        """Hidden rows, normalised for the head, and their logits; None where the program does not apply.

        It applies to causal, full and tree masks, and to memories of dense and coded strands on the CPU, or groups of
        them, in which a run of queries sees what the segment's mask, a window or a least distance show. Policies
        choose from strands inside the program, and are told what they observe behind it. Nothing is written where it does
        not apply.

        Args:
            tokens: (N,) int64 ids; None when `embeddings` (N, W) is given.
            rows: which segment and position each row belongs to.
            pasts: what each segment remembers; the rows are added to it as pending.
            wanted: (R,) int64, the rows to answer for; all when left out.
            with_logits: whether logits are computed.

        Returns:
            `(R, W)` and `(R, V)` fp32.

        Raises:
            ConfigError: an id is outside the vocabulary, or rows that do not continue their past.
        """
        if embeddings is not None and torch.is_grad_enabled() and embeddings.requires_grad:
            return None
        if any(type(segment.mask) not in _MASKS for segment in rows.segments):
            return None
        # Tables that last were made of layers that stay plain.
        for past in pasts:
            if past not in self._past_tables and not all(map(_is_plain, past.layers)):
                return None
            # Whoever watches is told by the plain form, and what is observed must not be learned twice.
            if any(layer.watcher is not None and layer.is_observed for layer in past.memories("watched")):
                return None
        adapters = [None if past.adapter is None else _native_form(past.adapter) for past in pasts]
        if _NONE in adapters:
            return None
        check_pasts(rows, pasts)
        if embeddings is not None:
            x = embeddings.detach().float().clone()
        elif tokens is not None:
            x = self.embed(tokens)
        else:
            raise ConfigError("A native program needs tokens or embeddings. Got neither.")
        if len(x) != len(rows):
            raise ConfigError(f"Each token needs one row. Got {len(x)} for {len(rows)} rows.")
        lengths = [len(past) for past in pasts]
        plan = self._plan(rows, pasts)
        if plan is None:
            for past, length in zip(pasts, lengths, strict=True):
                for layer in past.layers:
                    layer.truncate(length)
            return None
        segments, trees = _segments(rows)
        chosen = torch.arange(len(rows)) if wanted is None else wanted.to(torch.int64)
        hidden = torch.empty(len(chosen), self.config.width)
        logits = torch.empty(len(chosen), self.head_rows) if with_logits else None
        # Strands are visited by address; the tables keep them.
        tables, parts = plan
        targets, visits, choices, observed = PastTables.joined(parts)
        told = _Told(self.config, observed, rows)
        self.saved_visits = self._program.run(
            x.contiguous(),
            segments,
            tables.angles,
            targets,
            visits,
            choices,
            observed,
            trees,
            chosen.view(-1, 1),
            hidden,
            logits,
            adapters,
            self._growth_to(parts, rows),
        )
        told.tell(observed, rows, pasts)
        return hidden, None if logits is None else self.finish(logits)

    def _plan(self, rows: Rows, pasts: Sequence[Past]) -> tuple[_Tables, list[PastTables]] | None:
        """Where rows are written and what they visit; None for a visit of another kind."""
        tables = _Tables(rows)
        parts = []
        for index, (segment, past) in enumerate(zip(rows.segments, pasts, strict=True)):
            part = self._past_tables.get(past)
            if part is None or not part.extended(segment):
                part = PastTables.made(past, segment, self._heads)
                if part is None:
                    return None
                if part.is_lasting:
                    self._past_tables[past] = part
                else:
                    self._past_tables.pop(past, None)
            part.number(index, [tables.index(frame) for frame in part.frames])
            parts.append(part)
        return tables, parts

    def _growth_to(self, parts: Sequence[PastTables], rows: Rows) -> Tensor | None:
        """What biases take off scores at all distances that these rows may look at; None without a bias."""
        bias = next((heads.bias for heads in self._heads if heads.bias is not None), None)
        if bias is None:
            return None
        reach = PastTables.reach(parts, rows.segments)
        if self._growth is None or len(self._growth) < 2 * reach + 1:
            growth = bias.growth(torch.arange(1 << reach.bit_length()))
            self._growth = torch.cat([growth[1:].flip(0), growth])
        return self._growth

    def _add(self, block: Block) -> None:
        mixer, feed_forward = block.mixer, block.feed_forward
        assert isinstance(mixer, Attention)
        config = mixer.config
        gate, up = _gate_and_up(feed_forward)
        self._program.add_layer(
            epsilon=self.config.norm.epsilon,
            mixer_norm=_norm(block.mixer_norm),
            feed_forward_norm=_norm(block.feed_forward_norm),
            mixer_output_norm=_norm(block.mixer_output_norm),
            feed_forward_output_norm=_norm(block.feed_forward_output_norm),
            query_norm=_norm(mixer.query_norm),
            key_norm=_norm(mixer.key_norm),
            query_key_value=_projection(mixer.qkv).handle,
            output=_projection(mixer.output).handle,
            gate=None if gate is None else gate.handle,
            up=up.handle,
            activation=ACTIVATIONS[feed_forward.config.activation],
            down=_projection(feed_forward.down).handle,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=mixer.heads.scale,
            softcap=mixer.heads.softcap or 0.0,
            slopes=None if mixer.heads.bias is None else mixer.heads.bias.slopes.contiguous(),
        )
        self._heads.append(mixer.heads)


class _Tables:
    """The tables of angles of one call, each made once."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.angles: list[tuple[Tensor, Tensor]] = []
        self.known: dict[Frame, int] = {}

    def index(self, frame: Frame) -> int:
        """The table in which all rows stand in a frame, or at one position of it."""
        found = self.known.get(frame)
        if found is None:
            found = self.known[frame] = len(self.angles)
            if frame.is_pinned:
                angles = self.rows.angles_at(frame.rope, frame.offset)
            else:
                angles = self.rows.angles(frame.rope, [frame.offset] * len(self.rows.segments))
            self.angles.append((angles.cos.contiguous(), angles.sin.contiguous()))
        return found


class _Told:
    """Room for what the observers of a pass are told, one tensor for each of its layers and segments."""

    def __init__(self, config: TransformerConfig, observed: _Numbers, rows: Rows) -> None:
        self.queries: list[Tensor] = []
        self.lse: list[Tensor] = []
        for at, (layer, segment) in enumerate(observed[:, :2].tolist()):
            mixer = config.blocks[layer].mixer
            assert isinstance(mixer, AttentionConfig)
            count = rows.segments[segment].length
            self.queries.append(torch.empty(count, mixer.num_heads, mixer.head_dim))
            self.lse.append(torch.empty(count, mixer.num_heads))
            observed[at, 3:] = self.queries[-1].data_ptr(), self.lse[-1].data_ptr()

    def tell(self, observed: _Numbers, rows: Rows, pasts: Sequence[Past]) -> None:
        for (layer, number), queries, lse in zip(
            observed[:, :2].tolist(), self.queries, self.lse, strict=True
        ):
            memory, segment = pasts[number].layers[layer], rows.segments[number]
            assert isinstance(memory, Memory)
            memory.observe(Seen(segment, rows.positions[segment.rows], queries, lse))


def _native_form(adapter: object) -> Any:
    assert isinstance(adapter, Adapter)
    return adapter.to_native() or _NONE


def _segments(rows: Rows) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]]]:
    table: list[int] = []
    trees = []
    for index, segment in enumerate(rows.segments):
        if isinstance(segment.mask, Tree):
            depths = segment.mask.depths(segment.length)
            trees.append((index, depths.contiguous(), tree_bits(segment.mask)))
        table += (segment.start, segment.length, segment.position, _MASKS[type(segment.mask)])
    return _table(table, 4), trees


def _table(numbers: Sequence[int], columns: int) -> Tensor:
    """Rows of int64; much faster than a tensor made of a list."""
    if not numbers:
        return torch.zeros(0, columns, dtype=torch.int64)
    return torch.frombuffer(array("q", numbers), dtype=torch.int64).view(-1, columns)


def _is_plain(memory: object) -> bool:
    """Whether a memory has strands that the program can read."""
    return isinstance(memory, Memory) and all(map(_has_place, memory.held()))


def _has_place(strand: Strand) -> bool:
    group = strand.group
    return strand.layout is not None if group is None else all(map(_has_place, group.strands))


def _projection(linear: Linear) -> Projection:
    return Projection([part.to_native() for part in linear.weight.pieces()], linear.bias)


def _gate_and_up(feed_forward: FeedForward) -> tuple[Projection | None, Projection]:
    size, linear = feed_forward.config.size, feed_forward.up
    if not feed_forward.config.gated:
        return None, _projection(linear)
    parts = [part.to_native() for part in linear.weight.pieces()]
    first, second = (parts[0], 0), (parts[1], 0) if len(parts) == 2 else (parts[0], size)
    biases = [None, None] if linear.bias is None else list(linear.bias.detach().split(size))
    gate, up = (
        Projection([(matrix, start, size)], bias)
        for (matrix, start), bias in zip((first, second), biases, strict=True)
    )
    return gate, up


def _blocks(model: Transformer) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def _norm(norm: nn.Module | None) -> Tensor | None:
    return _plain(norm.weight) if isinstance(norm, Norm) else None


def _plain(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach().float().contiguous()
