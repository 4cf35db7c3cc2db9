"""The lossless verifier: settle a draft tree against the model's own choices.

At each node the next token is chosen exactly as plain decoding would choose it, with the uniform of
its own position; if a child proposes that token the walk goes on there, for free. So the tokens are
those of plain decoding, whatever was proposed: a proposal changes cost, never the answer.
"""

from __future__ import annotations

from torch import Tensor

from plait.decode.history import History
from plait.decode.sampler import Choice, Sampler
from plait.decode.speculate.tree import Tree

__all__ = ["verify"]


def verify(tree: Tree, logits: Tensor, sampler: Sampler, history: History) -> tuple[list[int], list[Choice]]:
    """Walk down the tree as far as the model agrees.

    Args:
        tree: what was proposed.
        logits: (nodes, V), raw, one row for each node.
        sampler: of the sequence.
        history: of the sequence, root included; unchanged on return.

    Returns:
        The accepted nodes from the root on, and the tokens chosen: one for each accepted node.
    """
    node, path, choices = 0, [0], [sampler.choose(logits[0], history, len(history))]
    if len(tree) == 1:
        return path, choices
    length = len(history)
    try:
        while True:
            token = choices[-1].token
            child = next((child for child in tree.children(node) if tree.tokens[child] == token), None)
            if child is None:
                return path, choices
            node = child
            path.append(node)
            history.append(token)
            choices.append(sampler.choose(logits[node], history, len(history)))
    finally:
        history.truncate(length)
