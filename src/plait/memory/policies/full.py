"""Full: a query sees every earlier token."""

from __future__ import annotations

from dataclasses import dataclass

from plait.memory.plan import Policy

__all__ = ["Full"]


@dataclass(frozen=True, kw_only=True)
class Full(Policy, name="full"):
    """See the whole past; exact. Time and bytes of a token grow with the length of the sequence."""

    @property
    def is_shareable(self) -> bool:
        return True
