"""The axes of choice: how strands are stored (codec) and which of them a query sees (policy)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from plait.errors import ConfigError, UnknownNameError, suggestion
from plait.memory.rows import Segment
from plait.memory.strand import DenseStrand, Strand
from plait.spec import Axis, Spec, split_specs

if TYPE_CHECKING:
    from plait.memory.memory import Memory

__all__ = ["CODECS", "POLICIES", "Codec", "MemoryPlan", "Policy", "Visit"]

CODECS = Axis("codec")
POLICIES = Axis("policy")


class Visit(NamedTuple):
    """One strand that the queries of a segment see, and how far back they see in it.

    `window` counts positions, the query's own included; None for no limit.
    """

    strand: Strand
    window: int | None = None


class Codec(Spec, axis=CODECS):
    """How committed tokens are stored.

    To add one: one file in `plait/memory/codecs/` with a frozen dataclass that derives from this
    class and the `Strand` it makes, and one import in that folder's `__init__.py`.
    """

    @property
    def tail_dtype(self) -> torch.dtype:
        """Number format of the dense tail, where new and speculative tokens live."""
        return torch.float32

    def seal(self, tail: DenseStrand) -> tuple[list[Strand], DenseStrand]:
        """Store committed tokens of the tail; called after every commit.

        Returns:
            The strands made, oldest first, and the tail that is left.
        """
        return [], tail


class Policy(Spec, axis=POLICIES):
    """Which strands a query sees.

    To add one: one file in `plait/memory/policies/` with a frozen dataclass that derives from this
    class, and one import in that folder's `__init__.py`.
    """

    def visits(self, memory: Memory, segment: Segment) -> list[Visit]:
        """The strands that the segment's queries see, oldest first; the tail is one of them."""
        return [Visit(strand, memory.window) for strand in memory.all_strands()]

    def settle(self, memory: Memory) -> None:
        """Drop or rearrange strands after a commit or a fork.

        May change `memory.strands` and `memory.tail`, but no shared strand itself.
        """

    def check_truncate(self, memory: Memory, length: int) -> None:
        """Raise `ConfigError` if the token after `length` tokens would see one that was dropped."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The choice made on each axis, for every layer of a sequence.

    Args:
        codec: how strands are stored.
        policy: which strands a query sees.
        device: where strands live.
    """

    codec: Codec = field(default_factory=lambda: CODECS.parse("dense"))
    policy: Policy = field(default_factory=lambda: POLICIES.parse("full"))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def parse(cls, text: str, device: torch.device | str = "cpu") -> MemoryPlan:
        """Read a spec string such as `"window:size=1024,dense:dtype=bf16"`.

        Raises:
            ConfigError: an unknown method or setting, or two methods on one axis.
        """
        codec: Codec | None = None
        policy: Policy | None = None
        for spec in split_specs(text):
            name = spec.partition(":")[0]
            if name in CODECS.methods:
                if codec is not None:
                    raise ConfigError(f"Two codecs in {text!r}: {codec.name} and {name}. Choose one.")
                codec = CODECS.parse(spec)
            elif name in POLICIES.methods:
                if policy is not None:
                    raise ConfigError(f"Two policies in {text!r}: {policy.name} and {name}. Choose one.")
                policy = POLICIES.parse(spec)
            else:
                known = [*CODECS.names(), *POLICIES.names()]
                raise UnknownNameError(
                    f"Unknown memory method {name!r}.{suggestion(name, known)}"
                    f" Codecs: {', '.join(CODECS.names())}. Policies: {', '.join(POLICIES.names())}."
                )
        return cls(
            codec=codec or CODECS.parse("dense"),
            policy=policy or POLICIES.parse("full"),
            device=torch.device(device),
        )

    def __str__(self) -> str:
        return f"{self.policy},{self.codec}"
