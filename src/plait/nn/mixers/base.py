"""What every mixer offers: the part of a block in which tokens exchange information."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from plait.memory import Memory, MemoryPlan, Rows, State

__all__ = ["Mixer"]


class Mixer(nn.Module):
    """Mixes the rows of each segment with that segment's past."""

    def forward(self, x: Tensor, rows: Rows, past: Sequence[Memory | State] | None = None) -> Tensor:
        """Mix packed rows.

        Args:
            x: (N, width) fp32.
            rows: which segment and position each row belongs to.
            past: what each segment remembers in this layer; updated in place. None for the parallel
                form, in which a segment sees only its own rows and gradients flow.

        Returns:
            (N, width) fp32.
        """
        raise NotImplementedError

    def new_memory(self, plan: MemoryPlan) -> Memory | State:
        """An empty past for one sequence in this layer."""
        raise NotImplementedError
