"""A mixture: the guesses of several methods in one tree.

Nodes that say the same behind the same text are one node. Where one of the methods draws its guesses, those are put
in first: a guess that was not drawn and says what a drawn sibling says is that sibling, since a token may be
judged only once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from plait.decode.sampler import Sampler
from plait.decode.speculate.base import SPECULATORS, Speculator, SpeculatorConfig
from plait.decode.speculate.draft_model import DraftModelConfig
from plait.decode.speculate.pearl import PEARL
from plait.decode.speculate.tree import Context, Tree
from plait.errors import ConfigError, IncompatibleError
from plait.nn import Transformer
from plait.spec import settings_of

__all__ = ["Mix", "Union", "merged"]


@dataclass(frozen=True, kw_only=True)
class Mix(SpeculatorConfig, name="mix"):
    """Propose what several methods guess, as one tree: `mix:prompt-lookup+token-recycling`.

    Costs what its parts cost, in drafting and in rows; the budget takes the likeliest guesses of all of them.
    Keeps answers as its parts do. At most one part may guess with a draft model.

    Args:
        parts: the methods, written with `+` between them, each with its settings; `budget=N` may stand among
            them. The budgets of parts have no effect.
    """

    parts: tuple[SpeculatorConfig, ...]

    @classmethod
    def from_text(cls, text: str) -> Self:
        pieces = text.split("+")
        own = [piece for piece in pieces if "=" in piece and ":" not in piece.partition("=")[0]]
        settings = settings_of(",".join(own))
        if unknown := set(settings) - {"budget"}:
            raise ConfigError(
                f"Mix has no setting {min(unknown)!r}. It takes budget; settings of a part stand behind its name."
            )
        budget: Any = settings.get("budget", "auto")
        return cls(
            parts=tuple(SPECULATORS.parse(piece) for piece in pieces if piece not in own),
            budget=int(budget) if budget.isdigit() else budget,
        )

    def check(self) -> None:
        if len(self.parts) < 2:
            raise ConfigError(
                f"Mix.parts must name at least two methods, as in mix:prompt-lookup+token-recycling. "
                f"Got {len(self.parts)}."
            )
        drawing = [part for part in self.parts if isinstance(part, DraftModelConfig)]
        if len(drawing) > 1:
            raise IncompatibleError(
                f"{drawing[0].name} and {drawing[1].name} both draw their guesses, and a tree holds the draws of one "
                "law. Leave one of them out."
            )
        if ahead := [part for part in self.parts if isinstance(part, (PEARL, Mix))]:
            raise IncompatibleError(f"{ahead[0].name} cannot be part of a mix. Use it alone.")

    def __str__(self) -> str:
        budget = [] if self.budget == "auto" else [f"budget={self.budget}"]
        return "mix:" + "+".join([*map(str, self.parts), *budget])

    @property
    def wants_draft_model(self) -> bool:
        return any(part.wants_draft_model for part in self.parts)

    def for_model(self, target: Transformer, draft: Transformer | None = None) -> Callable[[], Speculator]:
        if draft is not None and not self.wants_draft_model:
            raise IncompatibleError(
                f"No part of {self} has use for a draft model. Leave the draft model out."
            )
        makers = [part.for_model(target, draft if part.wants_draft_model else None) for part in self.parts]
        return lambda: Union([make() for make in makers])


class Union(Speculator):
    """One tree of what several speculators guess, each of which learns from it what it would learn alone."""

    def __init__(self, parts: Sequence[Speculator]) -> None:
        self.parts = parts
        # Of the last tree: those of the parts, and which node of the whole each of their nodes is.
        self.trees: list[Tree] = []
        self.nodes: list[list[int]] = []

    def propose(self, context: Context) -> Tree:
        self.trees = [part.propose(context) for part in self.parts]
        tree, self.nodes = merged(self.trees, context.budget)
        return tree

    def observe(self, tokens: Sequence[int], tree: Tree, path: Sequence[int], logits: Tensor) -> None:
        row_of = {node: row for row, node in enumerate(tree.scored)}
        for place, part in enumerate(self.parts):
            is_whole = len(tree) > 1 and place < len(self.trees)
            own = self.trees[place] if is_whole else Tree.root(tree.tokens[0])
            view, nodes = _seen(own, self.nodes[place] if is_whole else [0], tree)
            place_of: dict[int, int] = {}
            for mine, node in enumerate(nodes):
                place_of.setdefault(node, mine)
            rows = [row_of[nodes[mine]] for mine in view.scored]
            part.observe(tokens, view, [place_of[node] for node in path], logits[rows])

    def pass_over(self, tokens: Sequence[int], tree: Tree, path: Sequence[int], logits: Tensor) -> None:
        for part in self.parts:
            part.pass_over(tokens, tree, path, logits)

    def may_trim(self, sampler: Sampler) -> bool:
        return all(part.may_trim(sampler) for part in self.parts)

    def nbytes(self) -> int:
        return sum(part.nbytes() for part in self.parts)


def merged(trees: Sequence[Tree], most: int) -> tuple[Tree, list[list[int]]]:
    """The union of trees with one root, and for each tree which node of the union its nodes are.

    A node that finds no room is left out, and -1 stands for it; drawn nodes come first and always find it.

    Args:
        trees: one of them at most with drawn nodes.
        most: nodes of the union besides the root.
    """
    root = trees[0].tokens[0]
    tokens, parents = [root], [-1]
    probes: set[int] = set()
    places: list[list[int]] = [[] for _ in trees]
    children: dict[tuple[int, int], int] = {}
    order = sorted(range(len(trees)), key=lambda place: not trees[place].drawn)
    found: list[tuple[int, Hashable]] = [(0, ())]
    for place in order:
        tree = trees[place]
        for node, token in enumerate(tree.tokens):
            if not node:
                places[place].append(0)
                continue
            parent = places[place][tree.parents[node]]
            is_single = node in tree.drawn or node in tree.probes
            known = None if is_single else children.get((parent, token))
            if known is None and parent >= 0 and len(tokens) <= most:
                known = len(tokens)
                tokens.append(token)
                parents.append(parent)
                found.append((place, tree.slot(node)))
                if node in tree.probes:
                    probes.add(known)
                else:
                    children.setdefault((parent, token), known)
            places[place].append(-1 if known is None else known)
    counts = [0] * len(tokens)
    for nodes in places:
        for node in set(nodes) - {-1}:
            counts[node] += 1
    slots: list[Hashable] = [(*one, counts[node] > 1) for node, one in enumerate(found)]
    first = trees[order[0]]
    at = places[order[0]]
    return (
        Tree(
            tokens,
            parents,
            frozenset(at[node] for node in first.drawn),
            {at[node]: law for node, law in first.laws.items() if at[node] >= 0},
            first.replacement,
            probes=frozenset(probes),
            slots=slots,
        ),
        places,
    )


def _seen(own: Tree, nodes: Sequence[int], whole: Tree) -> tuple[Tree, list[int]]:
    """The tree of a part with what others added behind its own nodes, and which node of the whole each is."""
    found = list(nodes)
    tokens, parents = list(own.tokens), list(own.parents)
    place_of: dict[int, int] = {}
    for mine, node in enumerate(found):
        place_of.setdefault(node, mine)
    for node in range(len(whole)):
        if node not in place_of:
            place_of[node] = len(tokens)
            tokens.append(whole.tokens[node])
            parents.append(place_of[whole.parents[node]])
            found.append(node)
    unscored = {mine for mine, node in enumerate(found) if node < 0 or node in whole.unscored}
    probes = {place_of[node] for node in whole.probes} | own.probes
    return Tree(tokens, parents, probes=frozenset(probes), unscored=frozenset(unscored)), found
