"""Token healing: a prompt's last token is taken back, and the next token must begin with its text.

The usual remedy for prompts that end inside a token, as the guidance library does it. It repairs what one
token is enough for; where the right tokens begin further back it does not, as the exact law does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from plait.decode.bytes.cover import ByteTokens, Ids, LawReader

__all__ = ["heal"]


def heal(
    tokens: ByteTokens,
    reader: LawReader,
    start: Ids,
    ids: Ids,
    last: bytes,
    choose: Callable[[np.ndarray[tuple[int, ...], np.dtype[np.float64]]], int],
) -> Ids:
    """The prompt's tokens with the last one chosen again.

    Args:
        tokens: the tokenizer.
        reader: the model.
        start: tokens before every text, at least one.
        ids: tokens of the prompt; nothing is done if there are none.
        last: bytes of the last one.
        choose: an index into log-probabilities, (V,) in nats; those of tokens that do not fit are -inf.

    Returns:
        Tokens whose bytes begin with the prompt's.
    """
    if not ids or not last:
        return (*start, *ids)
    before = (*start, *ids[:-1])
    ((_, law),) = reader.read(before, [before])
    fitting = tokens.starting_with(last)
    allowed = np.full(tokens.vocab_size, -np.inf)
    allowed[fitting] = law[fitting]
    return (*before, choose(allowed))
