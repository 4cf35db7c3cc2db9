"""Tables that stand in for models, and what is expected of text that is drawn from them.

A table gives the logits of the next token for each pair of last two tokens: (V, V, V).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plait.decode import History, Sampler, Sampling
from plait.decode.speculate import Context, Tree, verify

__all__ = ["chi_square", "continuation", "joint_law", "logits_at", "random_table"]

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


def joint_law(table: Tensor, sampling: Sampling, length: int) -> npt.NDArray[np.float64]:
    """Exact law of the next `length` tokens after `PROMPT`, (V,) * length."""
    vocab_size = len(table)
    sampler = Sampler(sampling, vocab_size)
    law = np.zeros((vocab_size,) * length)
    for tokens in itertools.product(range(vocab_size), repeat=length):
        history = History(PROMPT)
        mass = 1.0
        for token in tokens:
            mass *= float(sampler.law(logits_at(table, [*PROMPT, *history.generated]), history)[token])
            history.append(token)
        law[tokens] = mass
    return law


def tree_logits(table: Tensor, tokens: Sequence[int], tree: Tree) -> Tensor:
    """Logits of every node, (nodes, V), as a forward pass over the tree gives them."""
    rows, paths = [], []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append([*paths[parent], token] if parent >= 0 else list(tokens))
        rows.append(logits_at(table, paths[-1]))
    return torch.stack(rows)


def continuation(
    table: Tensor, sampler: Sampler, propose: Propose, length: int, budget: int = 20
) -> tuple[tuple[int, ...], int]:
    """`length` tokens after `PROMPT` by drafting and checking, and how many checks they took."""
    history = History(PROMPT)
    tokens = list(PROMPT)
    checks = 0
    while len(tokens) < len(PROMPT) + length:
        context = Context(tokens, budget, 10**6, sampler, history)
        tree = propose(context)
        tree.check(context, len(table))
        _, choices = verify(tree, tree_logits(table, tokens, tree), sampler, history)
        checks += 1
        for choice in choices:
            tokens.append(choice.token)
            history.append(choice.token)
    return tuple(tokens[len(PROMPT) : len(PROMPT) + length]), checks


def chi_square(
    outcomes: Sequence[tuple[int, ...]], law: npt.NDArray[np.float64], smallest: float = 5.0
) -> float:
    """Probability of counts as unlikely as these under the law; cells expected rarely are pooled."""
    counts = np.zeros_like(law)
    for outcome in outcomes:
        counts[outcome] += 1
    expected = law * len(outcomes)
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
