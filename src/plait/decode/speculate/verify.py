"""The lossless verifier: settle a draft tree against the model's own law.

At a node whose children were not drawn at random, the next token is chosen exactly as plain decoding would
choose it, with the uniform of its own position; if a child proposes that token the walk goes on there, for
free. Drawn children are tried first, in the order of drawing, by rejection sampling. Either way the next
token has the model's law, whatever was proposed: a proposal changes cost, never the law. Without drawn
nodes, and in greedy decoding, the tokens are those of plain decoding with the same seed. The one exception
is a node that a tree declares as trusted: it is taken as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plait.decode.history import History
from plait.decode.sampler import Choice, Sampler, draw
from plait.decode.speculate.rejection import Rejection
from plait.decode.speculate.tree import Tree

__all__ = ["verify"]


def verify(tree: Tree, logits: Tensor, sampler: Sampler, history: History) -> tuple[list[int], list[Choice]]:
    """Walk down the tree as far as the model agrees.

    Args:
        tree: what was proposed.
        logits: (nodes, V), raw, one row for each scored node.
        sampler: of the sequence.
        history: of the sequence, root included; unchanged on return.

    Returns:
        The accepted scored nodes from the root on, and the tokens chosen: one for each of them. Where the last
        token is that of an unscored child, the walk ended there.
    """
    path: list[int] = [0]
    choices: list[Choice] = []
    row_of = {node: row for row, node in enumerate(tree.scored)}
    length = len(history)
    try:
        while True:
            choice, child = _settle(tree, path[-1], logits[row_of[path[-1]]], sampler, history)
            choices.append(choice)
            if child is None or child not in row_of:
                return path, choices
            path.append(child)
            history.append(choice.token)
    finally:
        history.truncate(length)


def _settle(
    tree: Tree, node: int, logits: Tensor, sampler: Sampler, history: History
) -> tuple[Choice, int | None]:
    """The token that follows a node, and the child that proposed it."""
    position = len(history)
    children = tree.children(node)
    trusted = next((child for child in children if child in tree.trusted), None)
    if trusted is not None:
        return sampler.report(logits, tree.tokens[trusted], position), trusted
    drawn = [child for child in children if child in tree.drawn]
    # A greedy law has a single token: rejection sampling would keep exactly the child that proposes it.
    if not drawn or sampler.sampling.is_greedy:
        choice = sampler.choose(logits, history, position)
    else:
        rounds = Rejection(sampler.law(logits, history), tree.laws[node], replacement=tree.replacement)
        for number, child in enumerate(drawn, start=1):
            token = tree.tokens[child]
            if rounds.accepts(token, sampler.streams.uniform(position, number)):
                return sampler.report(logits, token, position), child
            rounds.reject(token)
        token = draw(torch.from_numpy(rounds.target), sampler.streams.uniform(position))
        choice = sampler.report(logits, token, position)
    return choice, next((child for child in children if tree.tokens[child] == choice.token), None)
