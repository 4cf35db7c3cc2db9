"""PEARL: the draft model guesses on while the model checks what was guessed before.

Source: Liu et al. 2024, "PEARL: Parallel Speculative Decoding with Adaptive Draft Length", arXiv:2408.11850,
section 4. In their words: with nothing waiting, the first token of what is being drafted is judged by the pass that
runs meanwhile (pre-verify); where all of a window was right, what was drafted behind it is the next window, so that
a run of right guesses has no longest length (post-verify).

A window that is being checked is scored; what is drafted meanwhile stands below it, unscored. The last scored node
judges the first of it, and where that is right the walk ends open: the rest waits to be scored. The published
program draws the numbers of a pre-verify and the next post-verify with one seed; here each position has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from plait.decode.sampler import Sampler
from plait.decode.speculate.base import Speculator
from plait.decode.speculate.draft_model import DraftModelConfig, Reader, level_of
from plait.decode.speculate.tree import Context, Tree

__all__ = ["PEARL"]

# Tokens drafted beside one pass where time decides, and where it may not.
_MOST, _FIXED = 16, 4


@dataclass(frozen=True, kw_only=True)
class PEARL(DraftModelConfig, name="pearl"):
    """Draft with a second model while the model checks the last draft, each on its own core.

    Greedy answers are those of plain decoding; sampled ones have the model's law. Costs a core for the
    draft, and what it drafted behind a wrong guess. Pays where the draft is several times cheaper than
    the model and both have a core, or a device, of their own.

    Args:
        layers: blocks of a draft that is made of the model's own first blocks and its head.
        gamma: tokens drafted beside each pass; `auto` for as many as the pass leaves time for. A request
            with a temperature and a seed takes 4 then, so that its text does not depend on time.
    """

    gamma: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = "auto"

    def guess_with(self, reader: Reader) -> Speculator:
        return _Ahead(reader, self.gamma)


class _Ahead(Speculator):
    """Guesses of one sequence: `pending` were drafted, but not judged yet."""

    works_ahead = True

    def __init__(self, reader: Reader, gamma: int | Literal["auto"]) -> None:
        self.reader = reader
        self.gamma = gamma
        self.pending: list[tuple[int, Tensor]] = []
        # The draft laws behind the nodes of the last tree.
        self.laws: list[Tensor] = []
        self.context: Context | None = None

    def propose(self, context: Context) -> Tree:
        self.context = context
        return self._chain(self.pending[: max(context.budget, 0)], 0)

    def ahead(self, tree: Tree, is_done: Callable[[], bool]) -> Tree:
        context = self.context
        assert context is not None
        window = self.pending[: len(tree) - 1]
        by_time = self.gamma == "auto" and not self._is_seeded(context.sampler)
        gamma = _FIXED if self.gamma == "auto" else self.gamma
        most = min(_MOST if by_time else gamma, context.budget - len(window))
        drafted: list[tuple[int, Tensor]] = []
        while len(drafted) < most and not (by_time and drafted and is_done()):
            drafted.append(self._draft(context, [token for token, _ in window + drafted]))
        return self._chain(window + drafted, len(drafted))

    def observe(self, tokens: Sequence[int], tree: Tree, path: Sequence[int], logits: Tensor) -> None:
        following = path[-1] + 1
        is_open = following in tree.unscored and tree.tokens[following] == tokens[-1]
        if is_open:
            self.pending = [
                (tree.tokens[node], self.laws[node - 1]) for node in range(following + 1, len(tree))
            ]
        else:
            self.pending = []
            self.reader.go_back(len(tokens) - 1)

    def may_trim(self, sampler: Sampler) -> bool:
        # What is drafted ahead takes no row of the pass that it is drafted beside; leaving out a window ends a run.
        return False

    def may_rest(self, sampler: Sampler) -> bool:
        return not self._is_seeded(sampler)

    def nbytes(self) -> int:
        return self.reader.past.nbytes()

    def _is_seeded(self, sampler: Sampler) -> bool:
        return not sampler.sampling.is_greedy and sampler.sampling.seed is not None

    def _draft(self, context: Context, path: list[int]) -> tuple[int, Tensor]:
        """The next token below a path, and the law that it was drawn from."""
        logits = self.reader.start([*context.tokens, *path])
        level, laws = level_of(context, len(path), [len(path)], [path], logits, 1)
        return int(level.perturbed[0].argmax()), laws[0]

    def _chain(self, guesses: Sequence[tuple[int, Tensor]], ahead: int) -> Tree:
        """A chain below the root, the last nodes of it not scored."""
        context = self.context
        assert context is not None
        self.laws = [law for _, law in guesses]
        count = len(guesses) + 1
        tokens = [context.tokens[-1], *(token for token, _ in guesses)]
        is_drawn = not context.sampler.sampling.is_greedy
        return Tree(
            tokens,
            [node - 1 for node in range(count)],
            frozenset(range(1, count)) if is_drawn else frozenset(),
            dict(enumerate(self.laws)) if is_drawn else {},
            unscored=frozenset(range(count - ahead, count)),
        )
