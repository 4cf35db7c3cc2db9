"""Predicted programs with what the model said of each token, and programs with holes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from plait.code.syntax import Language, Syntax
from plait.decode.prediction_sets import MAX_NATS, Node, Tree, matches
from plait.errors import ConfigError

__all__ = ["HOLE", "Example", "PartialProgram", "Prediction", "predicted_tree"]

HOLE = "??"


@dataclass(frozen=True)
class Prediction:
    """A generated program, token by token.

    Args:
        pieces: bytes of each token; together, the program.
        logprobs: log-probability of each token under the model's own law, at temperature 1, in nats.

    Raises:
        ConfigError: not one log-probability for each token, or one that is NaN or above 0.
    """

    pieces: tuple[bytes, ...]
    logprobs: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.pieces) != len(self.logprobs):
            raise ConfigError(
                f"Each token needs one log-probability. Got {len(self.logprobs)} for {len(self.pieces)} tokens."
            )
        for logprob in self.logprobs:
            # Rounding may leave the log of a certain token a little above 0.
            if math.isnan(logprob) or logprob > 1e-4:
                raise ConfigError(f"A log-probability must be 0 or less. Got {logprob}.")

    @cached_property
    def source(self) -> bytes:
        """The program."""
        return b"".join(self.pieces)

    @property
    def nats(self) -> float:
        """Cost of the whole program."""
        return -math.fsum(self.logprobs)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; bytes as Latin-1."""
        return {"pieces": [piece.decode("latin-1") for piece in self.pieces], "logprobs": list(self.logprobs)}

    @classmethod
    def from_json(cls, data: Any) -> Prediction:
        """Read what `to_json` made.

        Raises:
            ConfigError: it has another form.
        """
        try:
            return cls(
                tuple(str(piece).encode("latin-1") for piece in data["pieces"]),
                tuple(float(logprob) for logprob in data["logprobs"]),
            )
        except (KeyError, TypeError, UnicodeEncodeError) as error:
            raise ConfigError(f"A prediction needs pieces and logprobs: {error}.") from None


class Example(NamedTuple):
    """A prediction and the true program."""

    prediction: Prediction
    truth: bytes


def predicted_tree(prediction: Prediction, language: Language) -> tuple[Tree, Syntax] | None:
    """The tree of a prediction with what its nodes cost; None if it does not parse.

    A byte belongs to the smallest node around it, white space to none. A token costs every node that it
    touches its whole log-probability.
    """
    syntax = language.parse(prediction.source)
    if syntax is None:
        return None
    owner = [-1] * len(prediction.source)
    for node, span in enumerate(syntax.spans):
        if span is not None:
            owner[span[0] : span[1]] = [node] * (span[1] - span[0])
    costs: list[float | None] = [None] * len(syntax.spans)
    start = 0
    for piece, logprob in zip(prediction.pieces, prediction.logprobs, strict=True):
        touched = {
            owner[start + index]
            for index in range(len(piece))
            if not piece[index : index + 1].isspace() and owner[start + index] >= 0
        }
        start += len(piece)
        for node in touched:
            costs[node] = min(MAX_NATS, (costs[node] or 0.0) + max(0.0, -logprob))
    return Tree(syntax.root, tuple(costs)), syntax


@dataclass(frozen=True)
class PartialProgram:
    """A predicted program with holes: the set of all programs that agree with what is left.

    Args:
        prediction: what was generated.
        tree: its tree; None if it does not parse: the set is everything then.
        spans: where each node stands in the source.
        kept: of each node, whether it is kept.
        tau: the threshold.
        language: of the program.
        variadic: whether a hole in a list stands for any number of elements.
    """

    prediction: Prediction
    tree: Tree | None
    spans: tuple[tuple[int, int] | None, ...]
    kept: tuple[bool, ...]
    tau: float
    language: Language
    variadic: bool = False

    @property
    def removed(self) -> float:
        """Share of the nodes that is removed; 1 for everything."""
        return 1.0 if self.tree is None else 1.0 - sum(self.kept) / len(self.kept)

    @property
    def holes(self) -> tuple[int, ...]:
        """Nodes that are removed under a kept one, and the root if nothing is kept."""
        if self.tree is None:
            return ()
        parents = self.tree.parents
        return tuple(
            node
            for node, kept in enumerate(self.kept)
            if not kept and (parents[node] < 0 or self.kept[parents[node]])
        )

    @property
    def text(self) -> str:
        """The program with `??` for each hole."""
        source = self.prediction.source
        if self.tree is None:
            return HOLE
        pieces, stop = [], 0
        for start, end in sorted(span for node in self.holes if (span := self.spans[node]) is not None):
            pieces += [source[stop:start], HOLE.encode()]
            stop = end
        return b"".join([*pieces, source[stop:]]).decode("utf-8", "replace")

    def contains(self, program: str | bytes) -> bool:
        """Whether a program is in the set. A text that does not parse never is, except in everything.

        Everything, the set of a prediction that does not parse or of which nothing is kept, holds any text.
        """
        if self.tree is None or not self.kept[0]:
            return True
        syntax = self.language.parse(program.encode() if isinstance(program, str) else program)
        return syntax is not None and self.holds(syntax.root)

    def holds(self, root: Node) -> bool:
        """`contains` for a program that is parsed already."""
        return self.tree is None or matches(self.tree, self.kept, root, variadic=self.variadic)

    def at(self, kept: Sequence[bool], tau: float) -> PartialProgram:
        """The same prediction with other nodes kept."""
        return PartialProgram(
            self.prediction, self.tree, self.spans, tuple(kept), tau, self.language, self.variadic
        )
