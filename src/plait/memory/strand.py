"""A strand: a run of remembered tokens of one layer, stored in a frame of positions of its own.

Shapes: Q queries, H query heads, G key/value heads, T tokens of the strand, D head size, V value size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from plait import ops
from plait.errors import CapacityError, ConfigError
from plait.ops import Angles, DistanceBias, Mask, Partial, Rope, Scoring, rotate
from plait.ops.coded import CODED, CodedForm
from plait.ops.native import NUMBERS

__all__ = [
    "DenseStrand",
    "FrozenStrand",
    "Group",
    "Heads",
    "HoldsTensors",
    "Layout",
    "Strand",
    "allocated_bytes",
]


@dataclass(frozen=True, eq=False)
class Heads:
    """The geometry of one attention layer.

    Args:
        num_heads: query heads H.
        num_kv_heads: key/value heads G; divides H.
        head_dim: size D of a query or key.
        scale: factor on the scores, usually `head_dim ** -0.5`.
        softcap: c in `c * tanh(score / c)`, or None.
        rope: rotary positions, or None where positions are not rotary.
        value_dim: size V of a value; `head_dim` when left out.
        bias: what is taken off the scores by distance, or None.

    Raises:
        ConfigError: `num_kv_heads` does not divide `num_heads`, `softcap` is not above 0, or `bias` is of another
            number of heads.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None = None
    rope: Rope | None = None
    value_dim: int | None = None
    bias: DistanceBias | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"Heads.num_kv_heads must divide num_heads {self.num_heads}. Got {self.num_kv_heads}."
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ConfigError(f"Heads.softcap must be above 0, or None. Got {self.softcap}.")
        if self.bias is not None and len(self.bias.slopes) != self.num_heads:
            raise ConfigError(
                f"Heads.bias must have a slope for each of {self.num_heads} heads. Got {len(self.bias.slopes)}."
            )

    @property
    def scoring(self) -> Scoring:
        """How a query and a key that it sees are scored, as the operations take it."""
        return {"scale": self.scale, "softcap": self.softcap, "bias": self.bias}

    @cached_property
    def unplaced(self) -> Heads:
        """The geometry of keys that stand nowhere, so that their distance is known to whoever visits them."""
        return self if self.bias is None else replace(self, bias=None)

    def tempered(self, temperature: float) -> Heads:
        """The same heads with every score divided by a temperature."""
        # A soft cap c is part of the score: c tanh(s / c) / T is the cap c / T of the score s / T.
        return replace(
            self,
            scale=self.scale / temperature,
            softcap=None if self.softcap is None else self.softcap / temperature,
            bias=None if self.bias is None else self.bias.divided_by(temperature),
        )


class Layout(NamedTuple):
    """Where the storage of a strand lies, for native code.

    Attributes:
        keys, values: addresses of the first numbers; of what describes them where they are coded.
        key_head_stride, key_stride, value_head_stride, value_stride: in numbers; 0 for coded ones.
        capacity: tokens there is room for; 0 where nothing can be added.
        number: their format in the program's tables.
        first: the strand's first token within the storage.
    """

    keys: int
    values: int
    key_head_stride: int
    key_stride: int
    value_head_stride: int
    value_stride: int
    capacity: int
    number: int
    first: int


class Group(NamedTuple):
    """Strands that are merged with each other before they join the rest of the past.

    Attributes:
        strands: at the positions at which they are seen.
        temperature: what scores are divided by.
        share: factor on the log-sum-exp of all of them.
    """

    strands: Sequence[Strand]
    temperature: float
    share: float


class Strand:
    """A run of consecutive tokens of one layer.

    Keys are stored rotated at their *frame* position. `offset` says where the frame starts in the
    sequence, so key i stands at sequence position `offset + start + i`. Moving the whole strand by d
    adds d to `offset`: queries are then rotated by d less when they visit, and no key is touched.

    Attributes:
        heads: the layer's geometry.
        offset: where the frame starts, in the sequence's positions.
        start: frame position of the first token.
    """

    # What is found from the other attributes when it is asked for, and what stands there before.
    found_later: ClassVar[Mapping[str, Any]] = {}

    # Whether it can be cut anywhere; a policy that sees the past in pieces sees one that cannot as a whole.
    is_divisible: ClassVar[bool] = True

    heads: Heads
    offset: int
    start: int

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def position(self) -> int:
        """Sequence position of the first token."""
        return self.offset + self.start

    def attend(self, q: Tensor, first_query: int, mask: Mask, window: int | None = None) -> Partial:
        """Attention of queries over this strand.

        Args:
            q: (Q, H, D), rotated in this strand's frame, that is at their position minus `offset`
                (the fold rotates them once for all strands of one frame).
            first_query: sequence position of the first query; the mask knows the others.
            mask: which keys each query sees.
            window: keys this many positions or more before a query are hidden; None for no limit.
        """
        raise NotImplementedError

    def native_form(self) -> CodedForm | None:
        """How the native operations read this strand's codes; None where they cannot, or there are none."""
        return None

    @property
    def layout(self) -> Layout | None:
        """Where the storage lies; None where the native operations cannot read it."""
        form = self.native_form()
        if form is None:
            return None
        return Layout(form.keys.address(), form.values.address(), 0, 0, 0, 0, 0, CODED, form.first)

    @property
    def place(self) -> tuple[int, ...] | None:
        """Its layout, its position and its length, as the native program's tables have a strand; None without a layout."""
        at = self.layout
        return None if at is None else (*at, self.position, len(self))

    @property
    def group(self) -> Group | None:
        """What this strand is made of, for native code, where it is several that are weighed together."""
        return None

    def split(self, at: int) -> tuple[Self, Self]:
        """Two strands that hold tokens [0, at) and [at, T). They share storage with this one."""
        raise NotImplementedError

    def moved(self, by: int) -> Self:
        """The same tokens `by` positions further on. Shares storage; no key is touched."""
        twin = copy.copy(self)
        twin.offset += by
        return twin

    def weighed_by(self, heads: Heads) -> Self:
        """The same tokens, sharing storage, with a geometry that differs in the factors on scores only."""
        twin = copy.copy(self)
        twin.heads = heads
        return twin

    def reframed(self, offset: int) -> Self:
        """The same tokens at the same positions, with keys turned to a frame that starts at `offset`.

        A strand whose keys cannot be turned as they are stored, because they are codes or lack channels,
        returns itself: queries go on being rotated for its own frame, which is exact.
        """
        return self

    def check_split(self, at: int) -> None:
        """Raise the error that `split(at)` would raise."""

    def copied(self) -> Self:
        """The same tokens in storage of their own, so that what this strand was split from can be freed.

        A strand whose storage is small enough to keep whole may return itself.
        """
        return self

    def joined(self, later: Strand) -> Strand | None:
        """The tokens of this strand and those right behind it as one strand, in storage of its own.

        None where the two cannot be stored as one.
        """
        return None

    def relocated(self, move: Callable[[Tensor], Tensor]) -> Self:
        """The same tokens with every stored tensor replaced by what `move` makes of it, in a fixed order."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if name in self.found_later:
                setattr(twin, name, self.found_later[name])
            elif name != "heads":
                setattr(twin, name, _relocated(value, move))
        return twin

    def restarted(self, start: int) -> Self:
        """The same numbers, said to start at another frame position: for numbers that are kept without their place."""
        twin = copy.copy(self)
        twin.start = start
        return twin

    def tensors(self) -> list[Tensor]:
        """Every tensor that this strand keeps allocated; views stand for the whole of their storage."""
        raise NotImplementedError

    def nbytes(self) -> int:
        """Bytes this strand keeps allocated, those of tokens that were split off included."""
        return allocated_bytes([self])


def _relocated(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """A value with the tensors in it replaced: one tensor, or several in strands, sequences and dataclasses."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, Strand):
        return value.relocated(move)
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_relocated(item, move) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: _relocated(getattr(value, field.name), move) for field in fields(value)}
        return replace(value, **changed)
    return value


class HoldsTensors(Protocol):
    """Something that keeps tensors allocated: a strand, or what a method notes beside strands."""

    def tensors(self) -> list[Tensor]: ...


def allocated_bytes(holders: Iterable[HoldsTensors]) -> int:
    """Bytes that strands and notes keep allocated together; storage that several of them share counts once."""
    storages = {}
    for holder in holders:
        for tensor in holder.tensors():
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class FrozenStrand(Strand):
    """Keys and values as plain numbers that never change again, so that several memories can share them.

    Args:
        heads: the layer's geometry.
        keys: (G, T, D), rotated in the strand's frame; kept without a copy.
        values: (G, T, V); kept without a copy.
        offset: where the frame starts, in the sequence's positions.
        start: frame position of the first token.
    """

    found_later: ClassVar[Mapping[str, Any]] = {"_layout": None}

    def __init__(
        self, heads: Heads, keys: Tensor, values: Tensor, *, offset: int = 0, start: int = 0
    ) -> None:
        self.heads = heads
        self.offset = offset
        self.start = start
        self.length = keys.shape[1]
        self._keys, self._values = keys, values
        self._layout: tuple[Tensor, Layout | None] | None = None

    @property
    def layout(self) -> Layout | None:
        # Found once for each storage, because a forward pass asks in every layer.
        keys, values = self._keys, self._values
        if self._layout is None or self._layout[0] is not keys:
            key_head, key = keys.stride()[:2]
            value_head, value = values.stride()[:2]
            self._layout = keys, None if not keys.is_cpu else Layout(
                keys.data_ptr(), values.data_ptr(), key_head, key, value_head, value, keys.shape[1],
                NUMBERS[keys.dtype], 0,
            )  # fmt: skip
        return self._layout[1]

    @classmethod
    def gathered(cls, strands: Sequence[FrozenStrand]) -> FrozenStrand:
        """The tokens of one or more strands in storage of their own, as one strand that starts where the first does."""
        first = strands[0]
        with torch.inference_mode(False), torch.no_grad():
            keys = torch.cat([strand.keys for strand in strands], dim=1)
            values = torch.cat([strand.values for strand in strands], dim=1)
        return FrozenStrand(first.heads, keys, values, offset=first.offset, start=first.start)

    def __len__(self) -> int:
        return self.length

    @property
    def keys(self) -> Tensor:
        """(G, T, D), rotated in this strand's frame; a view."""
        return self._keys[:, : self.length]

    @property
    def values(self) -> Tensor:
        """(G, T, V); a view."""
        return self._values[:, : self.length]

    def attend(self, q: Tensor, first_query: int, mask: Mask, window: int | None = None) -> Partial:
        return ops.partial_attention(
            q,
            self.keys,
            self.values,
            **self.heads.scoring,
            mask=mask,
            first_query=first_query,
            first_key=self.position,
            window=window,
        )

    def turned_back(self, positions: Tensor | None = None) -> FrozenStrand:
        """The same tokens with keys that are not rotated, for queries that a visit pins to one position.

        Their scores have no bias: the visit knows the distance at which they are seen.

        Args:
            positions: (T,) sequence positions of the tokens; one after the other when left out.
        """
        rope, keys = self.heads.rope, self.keys
        if rope is not None:
            if positions is None:
                positions = torch.arange(self.position, self.position + len(self), device=keys.device)
            angles = rope.angles(positions - self.offset)
            # The amplitude stays on the keys: only their angle is taken back.
            back = Angles(angles.cos / rope.amplitude, -angles.sin / rope.amplitude)
            keys = rotate(keys.transpose(0, 1).float(), back).to(keys.dtype).transpose(0, 1)
        return FrozenStrand(self.heads.unplaced, keys, self.values, start=self.position)

    def split(self, at: int) -> tuple[Self, Self]:
        front, back = copy.copy(self), copy.copy(self)
        for piece, low, high in ((front, 0, at), (back, at, self.length)):
            piece.start, piece.length = self.start + low, high - low
            piece._keys, piece._values = self._keys[:, low:high], self._values[:, low:high]
        return front, back

    def reframed(self, offset: int) -> Self:
        by, rope = self.offset - offset, self.heads.rope
        if by == 0 or (rope is not None and rope.rule is not None):
            return self
        twin = copy.copy(self)
        twin.offset, twin.start = offset, self.start + by
        if rope is not None:
            # The amplitude is in the keys already.
            angles = Rope(rope.frequencies).angles(torch.tensor([by], device=self._keys.device))
            with torch.inference_mode(False), torch.no_grad():
                twin._keys = ops.rotate(self.keys.float(), angles).to(self._keys.dtype)
        return twin

    def copied(self) -> Self:
        twin = copy.copy(self)
        with torch.inference_mode(False):
            twin._keys, twin._values = self.keys.clone(), self.values.clone()
        return twin

    def joined(self, later: Strand) -> FrozenStrand | None:
        # Keys in fp32 are turned to one frame, up to rounding; in fewer bits, or where speeds depend on the
        # length of the sequence, only strands of one frame are joined.
        if not isinstance(later, FrozenStrand) or self.position + len(self) != later.position:
            return None
        if self.keys.dtype != later.keys.dtype or self.heads is not later.heads:
            return None
        if self.offset != later.offset:
            rope = self.heads.rope
            if self.keys.dtype != torch.float32 or (rope is not None and rope.rule is not None):
                return None
            later = later.reframed(self.offset)
        return self.gathered([self, later])

    def tensors(self) -> list[Tensor]:
        return [self._keys, self._values]


class DenseStrand(FrozenStrand):
    """Keys and values as plain numbers; the only strand that can be appended to.

    Storage grows by a quarter at a time, so appending n tokens one by one costs O(n). What is written
    is detached: no gradient flows through it.

    Args:
        heads: the layer's geometry.
        offset: where the frame starts, in the sequence's positions.
        start: frame position of the first token.
        dtype: of the stored keys and values: float32, bfloat16 or float16.
        device: where they are stored.
    """

    def __init__(
        self,
        heads: Heads,
        *,
        offset: int = 0,
        start: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        value_dim = heads.value_dim or heads.head_dim
        # A tensor made in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            keys = torch.empty(heads.num_kv_heads, 0, heads.head_dim, dtype=dtype, device=device)
            values = torch.empty(heads.num_kv_heads, 0, value_dim, dtype=dtype, device=device)
        super().__init__(heads, keys, values, offset=offset, start=start)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write tokens behind the last one.

        Args:
            keys: (n, G, D), already rotated in this strand's frame.
            values: (n, G, V).
        """
        stop = self.length + keys.shape[0]
        self._reserve(stop)
        keys, values = keys.detach(), values.detach()
        if len(keys) == 1:
            # Decoding writes one row at a time: the short way is twice as fast.
            self._keys[:, self.length] = keys[0]
            self._values[:, self.length] = values[0]
        else:
            self._keys[:, self.length : stop] = keys.transpose(0, 1)
            self._values[:, self.length : stop] = values.transpose(0, 1)
        self.length = stop

    def extend(self, count: int) -> None:
        """Make room for tokens and count them; whoever asked writes them behind the last one (see `layout`)."""
        self._reserve(self.length + count)
        self.length += count

    def keep(self, rows: Tensor, first: int) -> None:
        """Of the tokens from index `first` on, keep those at `first + rows`, in that order; drop the others."""
        stop = first + rows.numel()
        self._keys[:, first:stop] = self._keys[:, first + rows]
        self._values[:, first:stop] = self._values[:, first + rows]
        self.length = stop

    def truncate(self, length: int) -> None:
        """Forget every token from index `length` on. Storage is kept for what comes next."""
        self.length = min(self.length, length)

    def frozen(self) -> FrozenStrand:
        """The same tokens, in the same storage, as a strand that nothing can be appended to."""
        return FrozenStrand(self.heads, self.keys, self.values, offset=self.offset, start=self.start)

    def growth(self, count: int) -> int:
        """Bytes of storage that appending `count` tokens would add."""
        held = self._keys.shape[1]
        row = self._keys.shape[0] * (self._keys.shape[2] + self._values.shape[2]) * self._keys.element_size()
        return (self._capacity(self.length + count) - held) * row

    def _capacity(self, length: int) -> int:
        """Tokens there is room for once `length` of them are held."""
        held = self._keys.shape[1]
        return held if length <= held else max(length, held * 5 // 4, 32)

    def _reserve(self, length: int) -> None:
        capacity = self._capacity(length)
        if capacity == self._keys.shape[1]:
            return
        try:
            # Both or neither: a failure must leave keys and values of one capacity.
            self._keys, self._values = self._grown(self._keys, capacity), self._grown(self._values, capacity)
        except RuntimeError as error:
            raise CapacityError(
                f"No memory for keys and values of {capacity} tokens. "
                f"Shorten the context or choose a smaller memory, such as memory='window:size=1024'."
            ) from error

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        with torch.inference_mode(False):
            new = old.new_empty(old.shape[0], capacity, old.shape[2])
        new[:, : self.length] = old[:, : self.length]
        return new
