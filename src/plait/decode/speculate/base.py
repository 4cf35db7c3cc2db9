"""What every speculator offers: cheap guesses of what the model will say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from plait.decode.sampler import Sampler
from plait.decode.speculate.tree import Context, Tree
from plait.errors import IncompatibleError
from plait.nn import Transformer
from plait.spec import Axis, Spec

__all__ = ["SPECULATORS", "Nothing", "Speculator", "SpeculatorConfig"]

SPECULATORS = Axis("speculator")


class Speculator:
    """Proposes draft trees for one sequence. It cannot change the answer, only what it costs.

    Attributes:
        works_ahead: whether `ahead` is to be called while a tree is being scored.
    """

    works_ahead: ClassVar[bool] = False

    def propose(self, context: Context) -> Tree:
        """Guess continuations of `context.tokens`; at most `context.budget` nodes besides the root."""
        raise NotImplementedError

    def ahead(self, tree: Tree, is_done: Callable[[], bool]) -> Tree:
        """Guess on while a tree is being scored, on another thread.

        Args:
            tree: what `propose` returned last.
            is_done: whether the pass that scores it has ended, and waits.

        Returns:
            The tree with further nodes, which are unscored.
        """
        return tree

    def observe(self, tokens: Sequence[int], tree: Tree, path: Sequence[int], logits: Tensor) -> None:
        """Learn from a checked tree.

        Args:
            tokens: every token of the sequence, the new ones included.
            tree: what was proposed, and which of it was scored; a root alone where nothing was.
            path: the scored nodes that were accepted, from the root on.
            logits: (scored nodes, V), raw, in the order of `tree.scored`.
        """

    def pass_over(self, tokens: Sequence[int], tree: Tree, path: Sequence[int], logits: Tensor) -> None:
        """Learn from a pass in which guessing rested, with a root alone; what is dear may be left out.

        Args: as of `observe`.
        """
        self.observe(tokens, tree, path, logits)

    def may_trim(self, sampler: Sampler) -> bool:
        """Whether guesses may be left out, or not made, without another text for the same seed.

        Where not, all that is proposed is scored, whether that pays or not.
        """
        return True

    def may_rest(self, sampler: Sampler) -> bool:
        """Whether nothing may be guessed for a while without another text for the same seed."""
        return self.may_trim(sampler)

    def nbytes(self) -> int:
        """Bytes allocated for guessing; what several sequences share counts in each."""
        return 0


@dataclass(frozen=True, kw_only=True)
class SpeculatorConfig(Spec, axis=SPECULATORS):
    """How to make a speculator.

    To add one: one file in `plait/decode/speculate/` with a frozen dataclass that derives from this
    class and the `Speculator` it builds, and one import in that folder's `__init__.py`.

    Args:
        budget: how many guesses are scored: `auto` as many as pay by the machine's own times; `off` all that
            are made; a number at most so many for each sequence and pass.
    """

    budget: Annotated[int, Field(ge=1, le=1024)] | Literal["auto", "off"] = "auto"

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

    @property
    def wants_draft_model(self) -> bool:
        """Whether it guesses with a second model that must be given."""
        return False

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
