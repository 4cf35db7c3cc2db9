"""Packed models that are tuned: the steps against their definitions, runs that go on exactly, files that open."""

from __future__ import annotations

import inspect
import itertools
import math
import shlex
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import plait
from plait.cli.main import app
from plait.engine import quantize
from plait.errors import ConfigError, IncompatibleError, PlaitError
from plait.nn.checkpoints.packed import PACKED_NAME, PackedCheckpoint
from plait.train import (
    PV,
    TUNERS,
    Corpus,
    DeviationAware,
    Distillation,
    ModelShape,
    StraightThrough,
    TokenData,
    Trainer,
    Training,
    Tuner,
    Values,
    changed,
    encoded,
    finish,
    language_model,
    packed,
    resume,
    sampled_text,
    train_new,
    tune_weights,
)
from plait.train.objectives.base import predict
from plait.weights import FORMATS, Tunable, tunable

LINES, OTHER = (inspect.getsource(module) for module in (textwrap, shlex))
TRAINING = "steps=8,rows=256,context=64,learning_rate=1e-2,warmup=1,save_every=100,evaluate_every=4"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that has read a module of the standard library."""
    folder = tmp_path_factory.mktemp("modules") / "model"
    shape = ModelShape(width=64, blocks=2, heads=2, kv_heads=1, inner=96, vocab_size=300, context=64)
    training = Training(steps=60, rows=256, context=64, learning_rate=1e-2, warmup=2)
    recipe = replace(language_model(), shape=shape, training=training)
    finish(train_new(recipe, Corpus([LINES], [], "modules"), folder), folder)
    return folder


@pytest.fixture(scope="module")
def small(origin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """That model in few bits."""
    root = tmp_path_factory.mktemp("small")
    made = {}
    for spec in (
        "uniform:bits=2,group=32",
        "db-llm:group=32",
        "vq:books=1,group=4",
        "bitmod:bits=3,group=32",
    ):
        made[spec.partition(":")[0]] = root / spec.partition(":")[0]
        quantize(origin, spec, made[spec.partition(":")[0]])
    return made


def new_run(
    origin: Path, start: Path, out: Path, method: Tuner, objective: str = "dad", training: str = TRAINING
) -> Trainer:
    from plait.train import OBJECTIVES

    recipe = packed()
    recipe = replace(
        recipe, training=changed(recipe.training, training), objective=OBJECTIVES.parse(objective)
    )
    return tune_weights(
        method,
        start,
        str(origin),
        lambda tokenizer: (encoded([LINES], tokenizer), encoded([OTHER], tokenizer)),
        out,
        recipe=recipe,
        corpus="modules",
    )


# The steps.


def quadratic(matrix: Tunable, goal: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
    """The loss 0.5 (w - goal)^T H (w - goal) of the matrix as one vector; leaves its gradient."""
    dense = matrix.dense()
    dense.retain_grad()
    matrix._seen = dense
    change = (dense - goal).reshape(-1)
    loss = 0.5 * change @ curvature @ change
    loss.backward()
    return loss.detach()


def random_problem(
    seed: int, spec: str = "uniform:bits=2,group=0"
) -> tuple[Tunable, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    weight = torch.randn(4, 16)
    root = torch.randn(64, 64) / 8
    matrix = tunable(FORMATS.parse(spec).pack(weight), "m")
    return matrix, weight + torch.randn(4, 16), root @ root.T + 0.05 * torch.eye(64)


def test_no_linearised_step_of_codes_raises_a_smooth_loss() -> None:
    moved = 0
    for seed in range(100):
        matrix, goal, curvature = random_problem(seed)
        before = quadratic(matrix, goal, curvature)
        assert matrix.gradient is not None
        longest = float(torch.linalg.eigvalsh(curvature)[-1])
        target = (matrix.dense() - matrix.gradient / longest).detach().reshape(-1, 1)
        groups = torch.arange(64)
        codes = matrix.nearest(target, groups)
        moved += int((codes != matrix.codes).sum())
        matrix.codes.copy_(codes)
        assert float(quadratic(matrix, goal, curvature)) <= float(before) * (1 + 1e-6)
    assert moved > 100


def test_a_step_of_codes_finds_the_best_of_all_codes_where_curvature_is_the_same_everywhere() -> None:
    every = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.uint8)
    for seed in range(20):
        torch.manual_seed(seed)
        matrix, goal = (
            tunable(FORMATS.parse("uniform:bits=2,group=0").pack(torch.randn(1, 6)), "m"),
            torch.randn(1, 6),
        )
        quadratic(matrix, goal, 3.0 * torch.eye(6))
        assert matrix.gradient is not None
        target = (matrix.dense() - matrix.gradient / 3.0).detach().reshape(-1, 1)
        groups = torch.arange(6)
        levels = torch.stack(
            [matrix.decoded(every[:, i : i + 1], groups[i].expand(4096))[:, 0] for i in range(6)], dim=1
        )
        losses = (levels - goal).square().sum(dim=1)
        reached = (matrix.decoded(matrix.nearest(target, groups), groups)[:, 0] - goal[0]).square().sum()
        assert float(reached) == pytest.approx(float(losses.min()), rel=1e-5)


@pytest.mark.parametrize("delta_decay", [0.0, 0.5, 1.0])
def test_a_step_changes_few_groups_by_little_and_lowers_the_loss(delta_decay: float) -> None:
    matrix, goal, curvature = random_problem(0, "uniform:bits=4,group=0")
    method = PV(fraction=0.1, trust=0.05, rate=0.2, delta_decay=delta_decay)
    method.prepare(matrix, None)
    assert ("latent" in dict(matrix.named_buffers())) == (delta_decay < 1)
    losses, total = [float(quadratic(matrix, goal, curvature))], 0
    for step in range(1, 16):
        codes, dense = matrix.codes.clone(), matrix.dense().detach()
        count = method.after_step({"m": matrix}, step)
        is_new = (codes != matrix.codes).any(dim=1)
        assert int(is_new.sum()) == count <= math.ceil(0.1 * 64)
        change = (matrix.dense().detach() - dense).reshape(-1)
        # At most the limit, or one group.
        assert float(change.norm()) <= 0.05 * float(dense.norm()) or count == 1
        total += count
        losses.append(float(quadratic(matrix, goal, curvature)))
    assert total > 0
    assert min(losses) < losses[0]


@pytest.mark.parametrize("kind", [PV, StraightThrough])
def test_codes_follow_the_schedule_of_the_learning_rate(kind: type[PV | StraightThrough]) -> None:
    codes = []
    for rate, share in ((0.4, 0.5), (0.2, 1.0), (0.4, 1.0)):
        matrix, goal, curvature = random_problem(3)
        method = kind(rate=rate) if kind is StraightThrough else PV(fraction=1.0, trust=0.0, rate=rate)
        method.prepare(matrix, None)
        for step in range(1, 4):
            quadratic(matrix, goal, curvature)
            method.after_step({"m": matrix}, step, share)
        codes.append(matrix.codes.clone())
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_steps_too_short_for_any_code_leave_all_codes(
    origin: Path, small: dict[str, Path], tmp_path: Path
) -> None:
    methods = (Values(), PV(fraction=1.0, trust=0.0, rate=1e-12), StraightThrough(rate=1e-12))
    runs = [new_run(origin, small["uniform"], tmp_path / str(i), m) for i, m in enumerate(methods)]
    for run in runs:
        run.run()
    assert [run.changed_codes for run in runs] == [0, 0, 0]
    for run in runs[1:]:
        for (name, first), second in zip(
            runs[0].trained.named_parameters(), run.trained.parameters(), strict=True
        ):
            assert torch.equal(first, second), name


def test_straight_through_from_the_model_chooses_planes_anew_as_scales_move(
    origin: Path, small: dict[str, Path], tmp_path: Path
) -> None:
    run = new_run(origin, small["db-llm"], tmp_path, StraightThrough(latent="model", rate=0.0))
    latents = {name: buffer.clone() for name, buffer in run.trained.named_buffers() if "latent" in name}
    run.run()
    assert run.changed_codes > 0
    assert latents
    for name, buffer in run.trained.named_buffers():
        assert name not in latents or torch.equal(buffer, latents[name])
    with pytest.raises(ConfigError, match="--teacher"):
        StraightThrough(latent="model").prepare(next(iter(run.tuned.matrices.values())), None)  # type: ignore[union-attr]


# Losses.


def test_without_gamma_every_token_counts_alike(origin: Path) -> None:
    lm = plait.load(origin, weights="fp32")
    data = encoded([LINES[:200]], lm.tokenizer)
    objective = DeviationAware(top=300, gamma=0.0)
    noted = objective.annotate(data, lm.model)
    batch = [noted.piece(0, 60)]
    found = predict(lm.model, batch)
    logits = lm.model.logits(found.hidden).detach()
    entropy = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)
    # Kept laws are rounded to fp16.
    value = objective.loss(lm.model, batch, torch.Generator()).value.detach()
    torch.testing.assert_close(value, entropy.mean(), rtol=1e-3, atol=1e-4)
    plain = Distillation(top=300, hard=0.0).loss(lm.model, batch, torch.Generator()).value.detach()
    torch.testing.assert_close(value, plain, rtol=1e-6, atol=1e-7)
    weights = replace(objective, gamma=1.0, mix=3.0).token_weights(batch, found.places, found.weights)
    assert not weights.requires_grad
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-4)
    wanted = (1 + 3 * entropy / entropy.mean()) / 4
    torch.testing.assert_close(weights, wanted, rtol=1e-3, atol=1e-4)
    broken = noted.with_notes({"teacher_entropies": torch.full((len(noted),), torch.nan)})
    with pytest.raises(ConfigError, match="NaN"):
        objective.loss(lm.model, [broken.piece(0, 60)], torch.Generator())
    with pytest.raises(ConfigError, match="gamma"):
        DeviationAware(gamma=-1.0)


# Runs.


@pytest.mark.parametrize(
    ("format", "method"),
    [
        ("db-llm", "straight-through:latent=model,rate=0"),
        ("uniform", "pv:fraction=0.05,trust=0.1,rate=0.05"),
        ("vq", "pv:fraction=0.05,delta_decay=1,rate=0.2"),
        ("bitmod", "straight-through:rate=0.02"),
    ],
)
def test_a_run_improves_its_start_and_goes_on_to_the_same_bytes(
    format: str, method: str, origin: Path, small: dict[str, Path], tmp_path: Path
) -> None:
    whole = new_run(origin, small[format], tmp_path / "whole", TUNERS.parse(method))
    result = finish(whole, tmp_path / "whole")
    assert result.held_out is not None
    assert result.held_out_before is not None
    assert result.held_out < result.held_out_before
    left = new_run(origin, small[format], tmp_path / "left", TUNERS.parse(method))
    left._evaluate()
    for _ in range(2):
        left.losses.append(left._update())
        left.step += 1
    left.save()
    finish(resume(tmp_path / "left"), tmp_path / "left")
    first, second = (load_file(tmp_path / name / PACKED_NAME) for name in ("whole", "left"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    # The file is as large as that of its start, says how it was made, and answers.
    with PackedCheckpoint(tmp_path / "whole") as made, PackedCheckpoint(small[format]) as before:
        assert made.made["tuned"]["method"] == str(TUNERS.parse(method))
        assert {n: i.nbytes for n, i in made.tensors().items()} == {
            n: i.nbytes for n, i in before.tensors().items()
        }
    lm = plait.load(tmp_path / "whole", weights="file")
    ids = lm.tokenizer.encode(LINES[:100])
    tuned = whole.model.eval()
    from plait.memory import Rows

    with torch.no_grad():
        rows = Rows([(len(ids), 0)])
        answers = [model.logits(model(torch.tensor(ids), rows)) for model in (lm.model, tuned)]
    # The placeholder has no finite score.
    near, wanted = (answer[answer.isfinite()] for answer in answers)
    assert float((near - wanted).abs().max()) < 0.05 * float(wanted.std())


def test_the_command_tunes_and_resumes(origin: Path, small: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(LINES)
    made = CliRunner().invoke(
        app,
        ["train", "weights", str(text), "--packed", str(small["db-llm"]), "--teacher", str(origin), "--out",
         str(tmp_path / "out"), "--training", TRAINING, "--json"],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert plait.load(tmp_path / "out").generate("import ", max_new_tokens=3)
    again = CliRunner().invoke(
        app, ["train", "weights", "--out", str(tmp_path / "out"), "--resume", "--json"]
    )
    assert again.exit_code == 0, again.output
    assert again.output.count('"steps": 8') == 1


def test_runs_are_refused_that_mean_nothing(
    origin: Path, small: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="plait quantize"):
        new_run(origin, origin, tmp_path / "a", Values())
    quantize(origin, "bitstack:blocks=2,scale=none,sort=error", tmp_path / "stack", calibration=LINES)
    with pytest.raises(ConfigError, match="stack of blocks"):
        new_run(origin, tmp_path / "stack", tmp_path / "b", Values())
    quantize(origin, "q8_0", tmp_path / "blocks")
    with pytest.raises(IncompatibleError, match=r"blocks\.0\.mixer\.query\.weight is in q8_0"):
        new_run(origin, tmp_path / "blocks", tmp_path / "c", Values())
    with pytest.raises(IncompatibleError, match="tokens"):
        new_run(Path("smollm2"), small["uniform"], tmp_path / "d", Values())
    run = new_run(origin, small["uniform"], tmp_path / "e", Values())
    run.save()
    with pytest.raises(ConfigError, match="holds a run"):
        new_run(origin, small["uniform"], tmp_path / "e", Values())
    with torch.no_grad():
        next(iter(run.trained.parameters()))[0] = torch.nan
    with pytest.raises(PlaitError, match="step 0"):
        run._update()
    assert resume(tmp_path / "e").step == 0
    monkeypatch.setattr("plait.train.runs._packed_base", lambda start: "other")
    with pytest.raises(ConfigError, match="not the model"):
        resume(tmp_path / "e")


def test_a_model_writes_texts_of_its_own(origin: Path) -> None:
    lm = plait.load(origin)
    data = sampled_text(lm, 5, 12, seed=3)
    assert len(data.lengths) == 5
    assert all(2 <= length <= 12 for length in data.lengths)
    assert torch.equal(data.ids, sampled_text(lm, 5, 12, seed=3).ids)
    assert not torch.equal(data.first(20).ids, sampled_text(lm, 5, 12, seed=4).first(20).ids)
    assert isinstance(data, TokenData)
