"""What every speculator offers: cheap guesses of what the model will say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from plait.decode.speculate.tree import Context, Tree
from plait.errors import IncompatibleError
from plait.nn import Transformer
from plait.spec import Axis, Spec

__all__ = ["SPECULATORS", "Nothing", "Speculator", "SpeculatorConfig"]

SPECULATORS = Axis("speculator")


class Speculator:
    """Proposes draft trees for one sequence. It cannot change the answer, only what it costs."""

    def propose(self, context: Context) -> Tree:
        """Guess continuations of `context.tokens`; at most `context.budget` nodes besides the root."""
        raise NotImplementedError

    def observe(self, tokens: Sequence[int], tree: Tree, path: Sequence[int], logits: Tensor) -> None:
        """Learn from a checked tree.

        Args:
            tokens: every token of the sequence, the new ones included.
            tree, path: what was proposed, and the nodes that were accepted.
            logits: (nodes, V), raw.
        """

    def nbytes(self) -> int:
        """Bytes allocated for guessing; what several sequences share counts in each."""
        return 0


class SpeculatorConfig(Spec, axis=SPECULATORS):
    """How to make a speculator.

    To add one: one file in `plait/decode/speculate/` with a frozen dataclass that derives from this
    class and the `Speculator` it builds, and one import in that folder's `__init__.py`.
    """

    def for_model(self, target: Transformer, draft: Transformer | None = None) -> Callable[[], Speculator]:
        """What makes a new speculator for each sequence of a model.

        What the sequences share is made here, once. A method that needs nothing of the model defines
        `build` alone.

        Args:
            target: the model that answers.
            draft: a cheaper model of the same vocabulary to guess with.

        Raises:
            IncompatibleError: a draft model was given to a method that has no use for one.
        """
        if draft is not None:
            raise IncompatibleError(f"{self.name} has no use for a draft model. Leave the draft model out.")
        return self.build

    def build(self) -> Speculator:
        """A new speculator for one sequence."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Nothing(SpeculatorConfig, name="none"):
    """Plain decoding: one token for each forward pass."""

    def build(self) -> Speculator:
        return _RootOnly()


class _RootOnly(Speculator):
    def propose(self, context: Context) -> Tree:
        return Tree.root(context.tokens[-1])
