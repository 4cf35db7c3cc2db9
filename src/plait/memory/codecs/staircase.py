"""Staircase quantisation: the older a token, the fewer bits its key and value have.

The form of one step is that of KIVI (Liu et al. 2024, arXiv:2402.02750): keys in groups of tokens of one
channel, values in groups of channels of one token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field

from plait.errors import ConfigError
from plait.memory.coded import CodedStrand, check_storable, matrix_of
from plait.memory.codes import AffineCodes
from plait.memory.memory import Memory
from plait.memory.plan import Codec, Notes
from plait.memory.sealing import seal_oldest
from plait.memory.strand import FrozenStrand, Heads, Strand

__all__ = ["Staircase"]

_WIDTHS = (2, 3, 4, 8, 16)

# A coded strand of this many tokens is full: nothing is joined to it, so that forks go on sharing it and
# joining costs O(1) a token.
_FULL = 1024


class _Step(NamedTuple):
    """Tokens from one age on, and their bits; `tokens` is None for the rest."""

    tokens: int | None
    bits: int


@dataclass(frozen=True, kw_only=True)
class Staircase(Codec, name="saq"):
    """Store keys and values in fewer and fewer bits as they grow older.

    Lossy but for 16 bits, which are fp16. Ages are counted from the newest token in whole groups; a group
    that crosses a step is coded anew from what is stored of it, once, so that its error is at most the sum
    of half the steps of the widths it has had. What is stored does not depend on how the tokens came: in
    one prompt, in parts or one by one. A prompt is read with exact attention and coded at its end.

    On a small model a staircase that ends at 2 bits loses to uniform 3 or 4 bits of the same size.

    Args:
        steps: `tokens@bits` from the newest tokens on, joined by `/`, the last `rest@bits`; tokens are
            multiples of `group`, bits 2, 3, 4, 8 or 16 and never more than in the step before.
        group: tokens of a key channel, and channels of a token's values, that share one scale; divides the
            value channels of all heads.
        sink: `tokens@bits`: the first tokens of the sequence keep at least these bits; `none` for no such step.
    """

    holdable: ClassVar[bool] = False

    steps: str = "64@16/128@8/rest@4"
    group: Annotated[int, Field(ge=1)] = 64
    sink: str = "none"

    def check(self) -> None:
        steps = self._stairs
        if steps[-1].tokens is not None or any(step.tokens is None for step in steps[:-1]):
            raise ConfigError(
                f"Staircase.steps must end with rest@bits, and only end so. Got {self.steps!r}."
            )
        for step, before in zip(steps, [steps[0], *steps], strict=False):
            if step.bits > before.bits:
                raise ConfigError(
                    f"Staircase.steps must not have more bits for older tokens. Got {self.steps!r}; "
                    "use sink for the first tokens."
                )
        for tokens, _ in [*steps, *([self._sink] if self._sink else [])]:
            if tokens is not None and tokens % self.group:
                raise ConfigError(
                    f"Staircase.steps and Staircase.sink take multiples of group {self.group}. Got {tokens} tokens."
                )

    @cached_property
    def _stairs(self) -> list[_Step]:
        return [self._step("steps", text) for text in self.steps.split("/")]

    @cached_property
    def _sink(self) -> _Step | None:
        return None if self.sink == "none" else self._step("sink", self.sink)

    def _step(self, field: str, text: str) -> _Step:
        found = re.fullmatch(r"([1-9][0-9]{0,8}|rest)@(\d{1,2})", text)
        if found is None or int(found[2]) not in _WIDTHS or (field == "sink" and found[1] == "rest"):
            raise ConfigError(
                f"Staircase.{field} takes tokens@bits, such as 64@8, with 2, 3, 4, 8 or 16 bits. Got {text!r}."
            )
        return _Step(None if found[1] == "rest" else int(found[1]), int(found[2]))

    @property
    def tail_dtype(self) -> torch.dtype:
        return torch.float16

    @property
    def exact_first(self) -> int:
        return self._sink.tokens or 0 if self._sink and self._sink.bits == 16 else 0

    def check_heads(self, heads: Heads) -> None:
        channels = heads.num_kv_heads * (heads.value_dim or heads.head_dim)
        if channels % self.group:
            raise ConfigError(
                f"Staircase.group must divide the {channels} value channels of all heads. Got {self.group}."
            )

    @property
    def _uncoded(self) -> int:
        """Newest tokens that stay in 16 bits."""
        return sum(step.tokens or 0 for step in self._stairs if step.bits == 16)

    def _bits(self, age: int, position: int) -> int:
        """Bits of a group with `age` newer tokens, whose first token stands at a position."""
        bits = self._stairs[-1].bits
        for step in self._stairs[:-1]:
            if age < (step.tokens or 0):
                bits = step.bits
                break
            age -= step.tokens or 0
        is_first = self._sink is not None and position < (self._sink.tokens or 0)
        return max(bits, self._sink.bits) if self._sink is not None and is_first else bits

    def ready(self, count: int) -> int:
        if self._stairs[-1].bits == 16:
            return 0
        old = max(count - self._uncoded, 0)
        return old - old % self.group

    def encode(self, strand: FrozenStrand, notes: Notes | None) -> CodedStrand:
        check_storable(self, strand)
        coded = [
            step.bits for step in [*self._stairs, *([self._sink] if self._sink else [])] if step.bits < 16
        ]
        return self._coded(strand, max(coded))

    def seal(self, memory: Memory, *, is_prompt: bool = False) -> None:
        tail = memory.tail
        if is_prompt:
            return
        seal_oldest(memory, self)
        if memory.tail is not tail:
            with torch.inference_mode(False), torch.no_grad():
                memory.strands = self._aged(memory.strands)

    def _aged(self, strands: list[Strand]) -> list[Strand]:
        """The strands after every coded group has come down to the step of its age."""
        kept = list(strands)
        stairs: list[CodedStrand] = []
        while kept and isinstance(kept[-1], CodedStrand):
            strand = kept[-1]
            if stairs and (strand.offset, strand.position + len(strand)) != (
                stairs[0].offset,
                stairs[0].position,
            ):
                break
            stairs.insert(0, strand)
            kept.pop()
        end = stairs[-1].position + len(stairs[-1])
        runs: list[list[CodedStrand]] = []
        for strand in stairs:
            for piece in self._by_step(strand, end):
                if runs and self._can_follow(runs[-1], piece):
                    runs[-1].append(piece)
                else:
                    runs.append([piece])
        return [*kept, *(self._joined(run) for run in runs)]

    def _by_step(self, strand: CodedStrand, end: int) -> list[CodedStrand]:
        """Parts of a strand whose groups have one width each, coded anew where that is less than before."""
        codes = _codes(strand)
        borders = range(-(strand.rows.start + codes.skipped) % self.group, len(strand), self.group)
        edges = sorted({0, *borders, len(strand)})
        parts: list[tuple[int, int]] = []
        for low, high in pairwise(edges):
            newer = (end - strand.position - high) // self.group * self.group
            bits = min(self._bits(self._uncoded + newer, strand.position + low), codes.bits)
            if parts and parts[-1][1] == bits:
                parts[-1] = (high, bits)
            else:
                parts.append((high, bits))
        if len(parts) == 1 and parts[0][1] == codes.bits:
            return [strand]
        pieces: list[CodedStrand] = []
        low = 0
        for high, bits in parts:
            piece = strand.split(high)[0].split(low)[1]
            if bits == codes.bits:
                piece = piece.copied()
            # Every step on the way is taken, as it is by a group that came alone.
            for width in sorted({step.bits for step in self._stairs}, reverse=True):
                if bits <= width < codes.bits:
                    piece = self._coded(piece.dense(), width)
            pieces.append(piece)
            low = high
        return pieces

    def _can_follow(self, run: list[CodedStrand], piece: CodedStrand) -> bool:
        """Whether a piece can be joined to a run: of its width, where a group ends, and while that is short."""
        last, codes = run[-1], _codes(piece)
        return (
            _codes(last).bits == codes.bits
            and sum(map(len, run)) < _FULL
            and (last.rows.stop + _codes(last).skipped) % self.group == 0
            and (piece.rows.start + codes.skipped) % self.group == 0
        )

    def _joined(self, run: list[CodedStrand]) -> CodedStrand:
        if len(run) == 1:
            return run[0]
        copies = [piece.copied() for piece in run]
        keys, values = (
            AffineCodes.joined([getattr(copy, name) for copy in copies]) for name in ("keys", "values")
        )
        return CodedStrand(run[0].heads, keys, values, offset=run[0].offset, start=run[0].start)

    def _coded(self, strand: FrozenStrand, bits: int) -> CodedStrand:
        keys = AffineCodes.of(matrix_of(strand.keys), bits, "tokens", self.group)
        values = AffineCodes.of(matrix_of(strand.values), bits, "channels", self.group)
        return CodedStrand(strand.heads, keys, values, offset=strand.offset, start=strand.start)


def _codes(strand: CodedStrand) -> AffineCodes:
    assert isinstance(strand.keys, AffineCodes)
    return strand.keys
