"""Real prompts of any number of tokens: runs of Python's manual."""

from __future__ import annotations

from collections.abc import Sequence


def prompts(lengths: Sequence[int]) -> list[list[int]]:
    """Consecutive runs of tokens, of these lengths."""
    import peers
    from plait.claims.texts import token_runs
    from plait.engine.loading import read_text_side
    from plait.hub import resolve
    from plait.nn.checkpoints import open_checkpoint

    with open_checkpoint(resolve(peers.MODEL)) as checkpoint:
        tokenizer, _ = read_text_side(checkpoint)
    return token_runs(tokenizer, lengths)


def words() -> list[str]:
    """The words of the manual, in order, without its line breaks."""
    from plait.claims.texts import manual

    return manual().split()
