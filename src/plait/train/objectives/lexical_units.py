"""Lexical unit decoding: learn to answer several placeholders at once, where the text is certain.

Source: Sun et al. 2024, "Decoding at the Speed of Thought", arXiv:2405.15208. A lexical unit is a run of
tokens of which all but the first were predicted with confidence. The packed form, in which all units of a
piece share one pass, and the weight of placeholders behind a unit's end are ours; so are the defaults.

Shapes: T tokens of a piece, U units, K placeholders of each, P = U K, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from plait.errors import ConfigError
from plait.memory import Rows
from plait.memory import Tree as TreeMask
from plait.nn import Transformer
from plait.train.data import Piece, TokenData
from plait.train.objectives.base import Loss, Objective, cross_entropy, mean_loss
from plait.train.objectives.distillation import Laws, check_laws, law_losses, teacher_logits

__all__ = ["LexicalUnits", "Placeholders", "Unit", "find_units", "placeholders"]


class Unit(NamedTuple):
    """A run of tokens of a piece: index of the first, and how many."""

    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class LexicalUnits(Objective, name="lud"):
    """Predict the tokens of a unit from placeholders in their places, and every next token as before.

    The input of a unit is what comes before it and `pads` placeholders; the row before them predicts the
    first token, placeholder j the one behind it. Units are found once, with the model before training.
    Costs `pads` rows for each unit beside those of the text.

    Args:
        alpha: a token belongs to the unit before it if it was predicted with more than this probability.
            Lower makes longer units, which are harder to predict.
        pads: placeholders of each unit; a unit has at most one token more.
        tail: weight of placeholders behind the end of their unit, relative to those inside; keeps their
            confidence honest.
        mix: weight of the units' loss, in [0, 1]; the loss of next tokens has the rest.
        share: of the units that get placeholders in a step, drawn at random.
        top: how many of the likeliest tokens at each place the model before training keeps. Then the text is learned
            from its laws instead of from the tokens themselves, so that plain decoding stays as it was. 0 for the
            tokens.
    """

    alpha: Annotated[float, Field(gt=0, le=1)] = 0.9
    pads: Annotated[int, Field(ge=1, le=16)] = 4
    tail: Annotated[float, Field(ge=0, le=1)] = 0.1
    mix: Annotated[float, Field(ge=0, le=1)] = 0.5
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    top: Annotated[int, Field(ge=0, le=1024)] = 32

    def annotate(self, data: TokenData, teacher: Transformer) -> TokenData:
        confidence = torch.zeros(len(data))
        laws = Laws(len(data), min(self.top, teacher.config.vocab_size))
        for places, wanted, logits in teacher_logits(data, teacher):
            confidence[places] = (-cross_entropy(logits, wanted)).exp()
            if self.top:
                laws.add(places, logits)
        return data.with_notes({"confidence": confidence, **(laws.notes if self.top else {})})

    def loss(self, model: Transformer, batch: Sequence[Piece], random: torch.Generator) -> Loss:
        placeholder = model.config.placeholder
        if placeholder is None:
            raise ConfigError("Lexical units need a model with a placeholder token. Set its placeholder id.")
        if any("confidence" not in piece.notes for piece in batch):
            raise ConfigError("Lexical units need data with confidences. Call annotate first.")
        parts = [
            placeholders(piece, self._chosen(piece, random), self.pads, self.tail, placeholder)
            for piece in batch
        ]
        return self.packed_loss(model, batch, parts)

    def packed_loss(self, model: Transformer, batch: Sequence[Piece], parts: Sequence[Placeholders]) -> Loss:
        """The loss with given placeholders, one pass for all of them."""
        rows = Rows([(len(part.tokens), 0, TreeMask(part.parents)) for part in parts])
        hidden = model(torch.cat([part.tokens for part in parts]), rows)
        next_rows, wanted, weights, pad_rows, labels, pad_weights, firsts = [], [], [], [], [], [], []
        for piece, part, segment in zip(batch, parts, rows.segments, strict=True):
            count = len(piece.ids)
            next_rows.append(torch.arange(segment.start, segment.start + count - 1))
            wanted.append(piece.ids[1:])
            weights.append(piece.weights[1:])
            first = torch.zeros(count)
            first[torch.tensor([unit.start for unit in part.units], dtype=torch.int64)] = 1.0
            firsts.append(first[1:] * piece.weights[1:])
            pad_rows.append(torch.arange(segment.start + count, segment.start + segment.length))
            labels.append(part.labels)
            pad_weights.append(part.weights)
        order = torch.cat([*next_rows, *pad_rows])
        logits = model.logits(hidden[order])
        own = sum(map(len, wanted))
        own_weights, first_weights = torch.cat(weights), torch.cat(firsts)
        if self.top:
            check_laws(batch)
            starts = accumulate((len(piece.ids) for piece in batch[:-1]), initial=0)
            places = torch.cat(
                [
                    torch.arange(start + 1, start + len(piece.ids))
                    for start, piece in zip(starts, batch, strict=True)
                ]
            )
            text_losses, has_law, _ = law_losses(logits[:own], batch, places)
            own_weights, first_weights = own_weights * has_law, first_weights * has_law
        else:
            text_losses = cross_entropy(logits[:own], torch.cat(wanted))
        losses = torch.cat([text_losses, cross_entropy(logits[own:], torch.cat(labels))])
        text = mean_loss(text_losses, own_weights)
        # A unit's loss is that of all its tokens; the first is predicted by a row of the text itself.
        units = mean_loss(losses, torch.cat([first_weights, *pad_weights]))
        value = (1 - self.mix) * text + self.mix * units
        return Loss(value, {"text": float(text.detach()), "units": float(units.detach())})

    def _chosen(self, piece: Piece, random: torch.Generator) -> list[Unit]:
        units = find_units(piece.notes["confidence"], piece.weights, self.alpha, self.pads + 1)
        if self.share == 1.0:
            return units
        kept = torch.rand(len(units), generator=random) < self.share
        return [unit for unit, keep in zip(units, kept.tolist(), strict=True) if keep]


def find_units(confidence: Tensor, weights: Tensor, alpha: float, longest: int) -> list[Unit]:
    """Cut the tokens that count into units, from left to right; each token is in exactly one.

    The first token of a piece, which nothing predicts, and tokens of weight 0, such as a prompt, are in
    none. A unit ends where the text does, since pieces are of one text.

    Args:
        confidence: (T,) probability of each token under the model, given those before it.
        weights: (T,) of the piece.
        alpha: every token of a unit but the first has a confidence above this.
        longest: most tokens of a unit.
    """
    counts = (weights > 0).tolist()
    certain = (confidence > alpha).tolist()
    units: list[Unit] = []
    start = 1
    while start < len(counts):
        stop = start + 1
        if counts[start]:
            while stop < len(counts) and stop - start < longest and counts[stop] and certain[stop]:
                stop += 1
            units.append(Unit(start, stop - start))
        start = stop
    return units


class Placeholders(NamedTuple):
    """A piece with placeholders behind it, as a tree: the text is a chain, and each unit a branch of it.

    Attributes:
        units: that the placeholders are of.
        tokens: (T + P,) ids, the text first.
        parents: of each row; the first placeholder of a unit stands behind the token before the unit.
        labels: (P,) what each placeholder predicts.
        weights: (P,) how much that counts.
    """

    units: list[Unit]
    tokens: Tensor
    parents: list[int]
    labels: Tensor
    weights: Tensor


def placeholders(
    piece: Piece, units: Sequence[Unit], pads: int, tail: float, placeholder: int
) -> Placeholders:
    """Put `pads` placeholders in the place of each unit, as far as the piece has tokens to predict."""
    count = len(piece.ids)
    parents = [row - 1 for row in range(count)]
    labels: list[int] = []
    weights: list[float] = []
    counts = piece.weights.tolist()
    for unit in units:
        above = unit.start - 1
        for j in range(1, min(pads, count - 1 - unit.start) + 1):
            parents.append(above)
            above = len(parents) - 1
            labels.append(unit.start + j)
            weights.append(counts[unit.start + j] * (1.0 if j < unit.length else tail))
    tokens = torch.cat([piece.ids, torch.full((len(labels),), placeholder, dtype=torch.int64)])
    return Placeholders(
        list(units),
        tokens,
        parents,
        piece.ids[torch.tensor(labels, dtype=torch.int64)],
        torch.tensor(weights),
    )
