"""Tables that stand in for models, and what is expected of text that is drawn from them.

A table gives the logits of the next token for each pair of last two tokens: (V, V, V). Its text comes out of the
product's own speculators and verifier, so that the law of what comes out can be compared with the exact one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plait.decode import History, Sampler, Sampling
from plait.decode.speculate import Context, Speculator, Tree, verify
from plait.decode.speculate.draft_model import Reader

__all__ = [
    "PROMPT",
    "Proposing",
    "TableReader",
    "chi_square",
    "chi_square_of",
    "continuation",
    "counted",
    "joint_law",
    "logits_at",
    "random_table",
    "spoken",
    "tree_logits",
]

PROMPT = (0, 1)

Propose = Callable[[Context], Tree]


def random_table(vocab_size: int, seed: int) -> Tensor:
    """Logits that vary by a few units, (V, V, V), float64."""
    return 1.5 * torch.randn(
        vocab_size,
        vocab_size,
        vocab_size,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )


def logits_at(table: Tensor, tokens: Sequence[int]) -> Tensor:
    """Logits of what follows the tokens, (V,)."""
    return table[tokens[-2], tokens[-1]]


def joint_law(
    table: Tensor, sampling: Sampling, length: int, prompt: Sequence[int] = PROMPT
) -> npt.NDArray[np.float64]:
    """Exact law of the next `length` tokens after a prompt, (V,) * length."""
    vocab_size = len(table)
    sampler = Sampler(sampling, vocab_size)
    law = np.zeros((vocab_size,) * length)
    for tokens in itertools.product(range(vocab_size), repeat=length):
        history = History(prompt)
        mass = 1.0
        for token in tokens:
            if not mass:
                break
            mass *= float(sampler.law(logits_at(table, [*prompt, *history.generated]), history)[token])
            history.append(token)
        law[tokens] = mass
    return law


def tree_logits(table: Tensor, tokens: Sequence[int], tree: Tree) -> Tensor:
    """Logits of every node, (nodes, V), as a forward pass over the tree gives them."""
    rows: list[Tensor] = []
    paths: list[list[int]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append([*paths[parent], token] if parent >= 0 else list(tokens))
        rows.append(logits_at(table, paths[-1]))
    return torch.stack(rows)


class TableReader(Reader):
    """A table in place of a draft model."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.tokens: list[int] = []

    def start(self, tokens: Sequence[int]) -> Tensor:
        # What was read before must be the beginning of the text, or else it should have been forgotten.
        if self.tokens != list(tokens[: len(self.tokens)]):
            raise AssertionError(f"the draft remembers {self.tokens}, and reads {tokens}")
        self.tokens = list(tokens)
        return logits_at(self.table, tokens)[None]

    def score(self, tree: Tree, nodes: Sequence[int]) -> Tensor:
        return tree_logits(self.table, self.tokens, tree)[list(nodes)]

    def keep(self, path: Sequence[int]) -> None:
        """A table remembers no tree."""

    def go_back(self, length: int) -> None:
        self.tokens = self.tokens[:length]


class Proposing(Speculator):
    """Proposes what a function says."""

    def __init__(self, propose: Propose) -> None:
        self._propose = propose

    def propose(self, context: Context) -> Tree:
        return self._propose(context)


def spoken(
    table: Tensor,
    sampler: Sampler,
    speculator: Speculator,
    length: int,
    budget: int = 20,
    prompt: Sequence[int] = PROMPT,
) -> tuple[tuple[int, ...], int]:
    """`length` tokens after a prompt by guessing and checking, and how many checks they took."""
    history = History(prompt)
    tokens = list(prompt)
    checks = 0
    while len(tokens) < len(prompt) + length:
        context = Context(tokens, budget, 10**6, sampler, history)
        tree = speculator.propose(context)
        tree.check(context, len(table))
        if speculator.works_ahead:
            tree = speculator.ahead(tree, lambda: True)
        logits = tree_logits(table, tokens, tree)[tree.scored]
        path, choices = verify(tree, logits, sampler, history)
        checks += 1
        for choice in choices:
            tokens.append(choice.token)
            history.append(choice.token)
        speculator.observe(tokens, tree, path, logits)
    return tuple(tokens[len(prompt) : len(prompt) + length]), checks


def continuation(
    table: Tensor, sampler: Sampler, propose: Propose, length: int, budget: int = 20
) -> tuple[tuple[int, ...], int]:
    """As `spoken`, with what a function proposes."""
    return spoken(table, sampler, Proposing(propose), length, budget)


def counted(outcomes: Iterable[tuple[int, ...]], shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """How often each outcome came, as an array of this shape."""
    counts = np.zeros(shape)
    for outcome in outcomes:
        counts[outcome] += 1
    return counts


def chi_square(
    outcomes: Iterable[tuple[int, ...]], law: npt.NDArray[np.float64], smallest: float = 5.0
) -> float:
    """Probability of outcomes as unlikely as these under the law; cells expected rarely are pooled."""
    return chi_square_of(counted(outcomes, law.shape), law, smallest)


def chi_square_of(
    counts: npt.NDArray[np.float64], law: npt.NDArray[np.float64], smallest: float = 5.0
) -> float:
    """As `chi_square`, of how often each outcome came."""
    expected = law * counts.sum()
    impossible = law <= 0
    if counts[impossible].any():
        return 0.0
    rare = (expected < smallest) & ~impossible
    common = ~rare & ~impossible
    pairs = list(zip(counts[common], expected[common], strict=True))
    if expected[rare].sum() >= smallest:
        pairs.append((counts[rare].sum(), expected[rare].sum()))
    statistic = math.fsum((count - mean) ** 2 / mean for count, mean in pairs)
    freedom = torch.tensor((len(pairs) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))
