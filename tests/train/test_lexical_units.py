"""Lexical units: how they are found, and that one packed pass equals one row a unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import PLACEHOLDER, VOCABULARY, run_config, small_data
from torch import Tensor

from plait.errors import ConfigError
from plait.memory import Rows
from plait.nn import Transformer
from plait.train import LexicalUnits, NextToken
from plait.train.data import Piece
from plait.train.objectives.distillation import with_laws
from plait.train.objectives.lexical_units import Unit, find_units, placeholders
from plait.train.runs import fresh_parameters

# The sums of one long row and of many short ones round differently in fp32.
SAME = 1e-5


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = run_config().model
    return Transformer(config, fresh_parameters(config.blocks, 5))


def pieces(context: int = 17, teacher: Transformer | None = None, top: int = 0) -> list[Piece]:
    data = small_data(4) if teacher is None else with_laws(small_data(4), teacher, top)
    data.weights[:3] = 0
    data.weights[20:26] = 0
    return [data.piece(start, stop) for start, stop in data.pieces(context)]


def one_unit_a_row(
    model: Transformer, batch: Sequence[Piece], objective: LexicalUnits
) -> tuple[Tensor, Tensor]:
    """The definition: each unit behind a copy of its own prefix; the loss of next tokens beside it."""

    def by_text(logits: Tensor, piece: Piece, index: int) -> tuple[Tensor, float]:
        """Of what a row of the text predicts: its loss, and how much it counts."""
        if not objective.top:
            return F.cross_entropy(logits, piece.ids[index]), 1.0
        law, tokens = piece.notes["teacher_laws"][index].float(), piece.notes["teacher_tokens"][index].long()
        return -(law * logits.log_softmax(dim=-1)[tokens]).sum(), float(law.sum() > 0)

    losses, weights = [], []
    text_losses, text_weights = [], []
    for piece in batch:
        hidden = model(piece.ids, Rows([(len(piece.ids), 0)]))
        for index, row in enumerate(model.logits(hidden[:-1]), start=1):
            loss, counts = by_text(row, piece, index)
            text_losses.append(loss)
            text_weights.append(counts * float(piece.weights[index]))
        confidence = piece.notes["confidence"]
        for unit in find_units(confidence, piece.weights, objective.alpha, objective.pads + 1):
            ids = torch.cat([piece.ids[: unit.start], torch.full((objective.pads,), PLACEHOLDER)])
            logits = model.logits(model(ids, Rows([(len(ids), 0)])))[unit.start - 1 :]
            for j, row in enumerate(logits):
                if unit.start + j < len(piece.ids):
                    inside = 1.0 if j < unit.length else objective.tail
                    loss = F.cross_entropy(row, piece.ids[unit.start + j])
                    if j == 0:
                        loss, inside = by_text(row, piece, unit.start)
                    losses.append(loss)
                    weights.append(inside * float(piece.weights[unit.start + j]))
    text = (torch.stack(text_losses) * torch.tensor(text_weights)).sum() / sum(text_weights)
    units = (torch.stack(losses) * torch.tensor(weights)).sum() / sum(weights)
    return text, units


@pytest.mark.parametrize(
    "settings",
    [
        {"top": 0},
        {"top": 0, "pads": 1, "tail": 0.0},
        {"top": 0, "pads": 6, "alpha": 0.3, "mix": 0.9},
        {"top": 5},
        {"tail": 0.5},
    ],
)
def test_the_packed_loss_equals_one_unit_a_row_with_gradients(model: Transformer, settings: dict) -> None:  # type: ignore[type-arg]
    objective = LexicalUnits(**({"alpha": 0.6} | settings))
    config = run_config().model
    teacher = Transformer(config, fresh_parameters(config.blocks, 6))
    batch = pieces(teacher=teacher if objective.top else None, top=objective.top)
    names = [name for name, _ in model.named_parameters()]
    text, units = one_unit_a_row(model, batch, objective)
    wanted = (1 - objective.mix) * text + objective.mix * units
    wanted_gradients = torch.autograd.grad(wanted, list(model.parameters()))
    loss = objective.loss(model, batch, torch.Generator())
    gradients = torch.autograd.grad(loss.value, list(model.parameters()))
    assert float(loss.value.detach()) == pytest.approx(float(wanted.detach()), abs=SAME)
    assert loss.parts["text"] == pytest.approx(float(text.detach()), abs=SAME)
    for name, gradient, expected in zip(names, gradients, wanted_gradients, strict=True):
        assert (gradient - expected).abs().max() <= SAME, name
    # The placeholder itself is learned.
    assert gradients[names.index("embedding.weight.weight")][PLACEHOLDER].abs().max() > 0


def test_no_real_token_sees_a_placeholder(model: Transformer) -> None:
    objective = LexicalUnits(alpha=0.5, top=0)
    batch = pieces()
    with torch.no_grad():
        plain = NextToken().loss(model, batch, torch.Generator()).value
        assert objective.loss(model, batch, torch.Generator()).parts["text"] == pytest.approx(
            float(plain), abs=SAME
        )


@settings(max_examples=80, deadline=None)
@given(
    confidence=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20),
    zeros=st.sets(st.integers(0, 19)),
    alpha=st.floats(0.05, 1),
    longest=st.integers(1, 6),
)
def test_units_cut_what_counts_into_runs_of_certain_tokens(
    confidence: list[float], zeros: set[int], alpha: float, longest: int
) -> None:
    weights = torch.tensor([0.0 if i in zeros else 1.0 for i in range(len(confidence))])
    units = find_units(torch.tensor(confidence), weights, alpha, longest)
    covered = [index for unit in units for index in range(unit.start, unit.start + unit.length)]
    assert covered == [i for i in range(1, len(confidence)) if i not in zeros]
    found = torch.tensor(confidence)
    for unit in units:
        assert 1 <= unit.length <= longest
        assert all(found[i] > alpha for i in range(unit.start + 1, unit.start + unit.length))
    for before, after in pairwise(units):
        # Units are as long as they may be.
        if before.start + before.length == after.start and before.length < longest:
            assert not found[after.start] > alpha


def test_placeholders_stand_where_the_tokens_would() -> None:
    piece = Piece(torch.arange(10, 16), torch.ones(6), {})
    part = placeholders(piece, [Unit(1, 2), Unit(4, 1)], pads=3, tail=0.25, placeholder=9)
    assert part.tokens.tolist() == [10, 11, 12, 13, 14, 15, 9, 9, 9, 9]
    assert part.parents == [-1, 0, 1, 2, 3, 4, 0, 6, 7, 3]
    assert part.labels.tolist() == [12, 13, 14, 15]
    assert part.weights.tolist() == [1.0, 0.25, 0.25, 0.25]


def test_confidence_is_the_models_own(model: Transformer) -> None:
    data = small_data(3)
    noted = LexicalUnits().annotate(data, model).notes["confidence"]
    for start, length in zip(data.starts(), data.lengths, strict=True):
        ids = data.ids[start : start + length]
        with torch.no_grad():
            law = model.logits(model(ids, Rows([(length, 0)]))).softmax(dim=-1)
        wanted = law[:-1].gather(1, ids[1:, None])[:, 0]
        assert torch.allclose(noted[start + 1 : start + length], wanted, atol=SAME)
        assert noted[start] == 0


def test_a_share_of_the_units_is_drawn_by_the_steps_own_numbers(model: Transformer) -> None:
    objective, batch = LexicalUnits(alpha=0.5, share=0.4, top=0), pieces()
    values = [
        float(objective.loss(model, batch, torch.Generator().manual_seed(seed)).value.detach())
        for seed in (1, 1, 2)
    ]
    assert values[0] == values[1] != values[2]


def test_what_is_missing_is_said(model: Transformer) -> None:
    bare = Transformer(replace(model.config, placeholder=None), fresh_parameters(model.config.blocks, 0))
    with pytest.raises(ConfigError, match="placeholder token"):
        LexicalUnits().loss(bare, pieces(), torch.Generator())
    with pytest.raises(ConfigError, match="Call annotate first"):
        LexicalUnits().loss(model, [Piece(torch.tensor([2, 3]), torch.ones(2), {})], torch.Generator())
    without_laws = Piece(torch.tensor([2, 3]), torch.ones(2), {"confidence": torch.ones(2)})
    with pytest.raises(ConfigError, match="teacher has annotated"):
        LexicalUnits(top=4).loss(model, [without_laws], torch.Generator())
    for settings_text in ("alpha=0", "alpha=1.5", "pads=0", "tail=-1", "share=0"):
        with pytest.raises(ConfigError, match="LexicalUnits"):
            LexicalUnits.from_settings(dict([settings_text.split("=")]))
    assert VOCABULARY > PLACEHOLDER
