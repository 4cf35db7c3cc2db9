"""What a group of beams pays for repeating earlier groups.

Source: Vijayakumar et al. 2018, "Diverse Beam Search", arXiv:1610.02424, section 5.1 (their Delta functions).
Shapes: b beams of the group, V vocabulary, W width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["DIVERSITIES", "Diversity", "Step"]

Diversity = Literal["hamming", "cumulative", "ngram", "embedding"]

_Array = npt.NDArray[np.float64]
_Tokens = tuple[int, ...]

_NGRAM = 2


class Step(NamedTuple):
    """What a group may be compared with at one step.

    Attributes:
        beams: tokens so far of each of the group's beams, all of one length.
        earlier: for each earlier group, the tokens of its beams, the one of this step included; beams
            that have ended are left out.
        vocab_size: V.
        embeddings: unit rows, (V, W); made on the first call.
    """

    beams: Sequence[_Tokens]
    earlier: Sequence[Sequence[_Tokens]]
    vocab_size: int
    embeddings: Callable[[], _Array]

    @property
    def chosen(self) -> list[int]:
        """The token that each beam of the earlier groups took at this step."""
        return [tokens[-1] for group in self.earlier for tokens in group]


def hamming(step: Step) -> _Array:
    """Minus how many beams of earlier groups took each token at this step, (b, V)."""
    counts = np.bincount(np.array(step.chosen, dtype=np.int64), minlength=step.vocab_size)
    return np.tile(-counts.astype(np.float64), (len(step.beams), 1))


def cumulative(step: Step) -> _Array:
    """`hamming`, less so for beams that already differ from the earlier groups, (b, V).

    Scaled by exp(-d), with d the fraction of earlier positions that differ, averaged over groups.
    """
    penalty = hamming(step)
    for row, tokens in enumerate(step.beams):
        if tokens and step.earlier:
            apart = [
                np.mean([[a != b for a, b in zip(tokens, other, strict=False)] for other in group])
                for group in step.earlier
                if group
            ]
            penalty[row] *= np.exp(-np.sum(apart) / len(step.earlier))
    return penalty


def ngram(step: Step) -> _Array:
    """Minus how often earlier groups' texts hold the pair of tokens that each token would complete, (b, V)."""
    penalty = np.zeros((len(step.beams), step.vocab_size))
    for row, tokens in enumerate(step.beams):
        before = tokens[len(tokens) - _NGRAM + 1 :] if len(tokens) >= _NGRAM - 1 else None
        for other in (other for group in step.earlier for other in group):
            for end in range(_NGRAM, len(other) + 1):
                if other[end - _NGRAM : end - 1] == before:
                    penalty[row, other[end - 1]] -= 1
    return penalty


def embedding(step: Step) -> _Array:
    """Minus the summed cosine, where positive, between each token and those taken by earlier groups, (b, V)."""
    penalty = np.zeros(step.vocab_size)
    for token in step.chosen:
        unit = step.embeddings()
        penalty -= np.maximum(unit @ unit[token], 0.0)
    return np.tile(penalty, (len(step.beams), 1))


DIVERSITIES: Mapping[Diversity, Callable[[Step], _Array]] = {
    "hamming": hamming,
    "cumulative": cumulative,
    "ngram": ngram,
    "embedding": embedding,
}
