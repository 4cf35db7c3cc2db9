"""The benchmark of one-bit methods: its metrics by hand, its data, and cells that fail, repeat and go on."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn

from plait.claims.bibench.cells import FULL, FULL_PRECISION, QUICK, TINY, Cell, Grid, Outcome, Setting
from plait.claims.bibench.corruptions import CORRUPTIONS, STRENGTHS, corrupted
from plait.claims.bibench.data import TASKS
from plait.claims.bibench.expected import EXPECTED
from plait.claims.bibench.networks import NETWORKS
from plait.claims.bibench.report import draw_radar, measure
from plait.claims.bibench.tracks import TRACKS, Scores, counted, quadratic_mean
from plait.claims.measure import follow
from plait.errors import ConfigError, MissingExtraError, UnknownNameError
from plait.weights.binary import BNN, DoReFa, begin_epoch, binarize, export


def quiet(line: str) -> None:
    """Progress that nobody reads."""


@pytest.fixture(scope="module")
def tiny() -> Grid:
    """A grid whose data are made once."""
    return Grid(TINY, ["bnn", "fda"])


def filled(tiny: Grid) -> Grid:
    """A grid in which every cell has an outcome that was made up."""
    grid = Grid(TINY, ["bnn", "fda"])
    grid.task = tiny.task  # type: ignore[method-assign]
    accuracy = {FULL_PRECISION: 0.9, "bnn": 0.45, "fda": 0.72}
    for number, (method, right) in enumerate(accuracy.items()):
        for setting_number, setting in enumerate(TINY.settings):
            for network in NETWORKS:
                # Transformers keep half as much.
                kept = (
                    right
                    if method == FULL_PRECISION or NETWORKS[network].family != "transformer"
                    else right / 2
                )
                shaken = dict.fromkeys(CORRUPTIONS, (kept - 0.1 * (number + 1),) * STRENGTHS)
                grid.outcomes[Cell(method, network, setting, 0)] = Outcome(
                    kept - 0.2 * setting_number * (number + 1), 2.0 * (number + 1), (), shaken
                )
    return grid


def scores_of(track: str, grid: Grid) -> Scores:
    return follow(TRACKS[track](grid), quiet)


def test_tasks_and_families_are_quadratic_means_of_kept_accuracy(tiny: Grid) -> None:
    grid = filled(tiny)
    by_task, by_family = scores_of("task", grid), scores_of("architecture", grid)
    assert by_task[FULL_PRECISION].overall == by_family[FULL_PRECISION].overall == 1
    # bnn keeps 1/2, and 1/4 in transformers. Points have no transformer.
    tasks = {"digits": 0.375, "points": 0.5, "lines": 0.375, "events": 0.375}
    assert by_task["bnn"].parts == pytest.approx(tasks)
    assert by_task["bnn"].overall == pytest.approx(math.sqrt(statistics.fmean(v * v for v in tasks.values())))
    assert by_task["bnn"].raw["lines-transformer"] == pytest.approx(0.225)
    assert by_family["fda"].parts == pytest.approx({"cnn": 0.8, "transformer": 0.4, "mlp": 0.8})
    assert by_family["fda"].overall == pytest.approx(math.sqrt((0.64 + 0.16 + 0.64) / 3))


def test_robustness_and_training_are_ratios_to_full_precision(tiny: Grid) -> None:
    grid = filled(tiny)
    robust = scores_of("robustness", grid)
    assert robust[FULL_PRECISION].overall == 1
    assert robust["bnn"].parts == pytest.approx(dict.fromkeys(CORRUPTIONS, 0.5))
    assert robust["fda"].overall == pytest.approx(1 / 3)
    training = scores_of("training", grid)
    assert training[FULL_PRECISION].overall == 1
    # Two settings whose accuracies are 0.2, 0.4 and 0.6 apart.
    assert training["fda"].parts == pytest.approx({"seconds": 1 / 3, "spread": 1 / 3})
    assert training["bnn"].raw == pytest.approx({"seconds": 4.0, "spread": 0.2})


def test_a_gain_by_corruption_is_not_an_infinite_ratio(tiny: Grid) -> None:
    grid = filled(tiny)
    for cell in list(grid.outcomes):
        if cell.method == "bnn":
            better = dict.fromkeys(CORRUPTIONS, (0.99,) * STRENGTHS)
            grid.outcomes[cell] = dataclasses.replace(grid.outcomes[cell], corrupted=better)
    # Full precision loses 0.1; a loss counts as one image of 64 at least.
    assert scores_of("robustness", grid)["bnn"].overall == pytest.approx(0.1 * 64)


def test_a_mean_of_squares_is_not_a_mean() -> None:
    assert quadratic_mean([1.0, 7.0]) == 5
    assert math.isnan(quadratic_mean([]))


def test_bits_and_operations_are_those_of_the_formula() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), nn.Flatten(), nn.Linear(64, 10)
    )
    plain_bits, plain_operations = counted(model, torch.zeros(1, 1, 2, 2))
    parameters = 80 + (16 * 72 + 16) + 650
    operations = (4 * 72, 4 * 16 * 72, 640)
    assert plain_bits == 32 * parameters
    assert plain_operations == sum(operations)
    binarize(model, DoReFa())
    bits, made = counted(model, torch.zeros(1, 1, 2, 2))
    # A scale for each of 16 rows is kept too.
    assert bits == 16 * 72 + 32 * (parameters - 16 * 72 + 16)
    assert made == operations[0] + operations[1] / 64 + operations[2]
    # Where inputs are not binary, no operation is.
    again = nn.Sequential(nn.Linear(8, 8))
    binarize(again, BNN(binary_inputs=False), skip=[])
    assert counted(again, torch.zeros(1, 8))[1] == 64


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_runs_packed_as_it_was_trained(tiny: Grid, network: str) -> None:
    torch.manual_seed(0)
    model = tiny.build(network, "react")
    assert 0 < sum(p.numel() for p in tiny.build(network, FULL_PRECISION).parameters()) < 300_000
    begin_epoch(model, 0, 1)
    x = tiny.task(NETWORKS[network].task).held_out.inputs
    model.train()
    model(x)
    with torch.no_grad():
        assert torch.equal(export(model)(x), model.eval()(x))


def test_the_whole_benchmark_runs_and_is_drawn(tiny: Grid, tmp_path: Path) -> None:
    steps = (Setting(), Setting("sgd", 0.1, "step"))
    scale = dataclasses.replace(TINY, learned=64, settings=steps, rounds=1, served_width=16)
    grid = Grid(scale, ["bnn", "recu"], tmp_path / "cells")
    report = follow(measure(grid), quiet)
    assert list(report.scores) == list(TRACKS)
    for scores in report.scores.values():
        assert list(scores) == [FULL_PRECISION, "bnn", "recu"]
        assert scores[FULL_PRECISION].overall == 1
        assert all(score.overall > 0 for score in scores.values())
    assert report.scores["complexity"]["bnn"].parts["bits"] > 3
    assert [one.name for one in report.findings] == list(EXPECTED)
    verdicts = [line.partition(":")[0] for line in report.lines()[-len(EXPECTED) :]]
    assert verdicts == ["reproduced" if one.is_so else "not reproduced" for one in report.findings]
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["tracks"]["task"]["recu"]["overall"] == report.scores["task"]["recu"].overall
    for suffix in ("svg", "png"):
        draw_radar(report, tmp_path / f"radar.{suffix}")
        assert (tmp_path / f"radar.{suffix}").stat().st_size > 10_000
    # What was trained is read again, to the same numbers.
    again = Grid(scale, ["bnn", "recu"], tmp_path / "cells")
    again._train = None  # type: ignore[assignment,method-assign]
    kept = follow(measure(again, ["task", "robustness", "training"]), quiet)
    assert all(kept.scores[track] == report.scores[track] for track in kept.scores)
    for damage in ("", "[]", '{"accuracy": 1}'):
        for path in (tmp_path / "cells").glob("bnn*.json"):
            path.write_text(damage)
        with pytest.raises(ConfigError, match="Remove it to train the cell again"):
            follow(measure(Grid(scale, ["bnn", "recu"], tmp_path / "cells"), ["robustness"]), quiet)
    with pytest.raises(ConfigError, match="cells of another scale"):
        Grid(TINY, [], tmp_path / "cells")


def test_a_cell_is_the_same_again(tiny: Grid) -> None:
    cell = Cell("fda", "digits-cnn", Setting(), 0)
    first, second = tiny._train(cell), tiny._train(cell)
    assert first.losses == second.losses
    assert (first.accuracy, first.corrupted) == (second.accuracy, second.corrupted)
    assert tiny._train(cell._replace(seed=1)).losses != first.losses


def test_a_cell_without_a_loss_is_marked_and_the_others_go_on() -> None:
    grid = Grid(TINY, ["bnn"])
    bad = Cell(FULL_PRECISION, "digits-transformer", Setting("sgd", 1e30), 0)
    good = Cell("bnn", "points-mlp", Setting(), 0)
    lines: list[str] = []
    outcomes = follow(grid.run([bad, good]), lines.append)
    assert "The loss is nan in epoch 0" in outcomes[bad].failure
    assert math.isnan(outcomes[bad].accuracy)
    assert not outcomes[good].failure
    assert len(lines) == 2


@pytest.mark.parametrize("name", TASKS)
def test_data_are_real_labelled_and_split(name: str) -> None:
    task = TASKS[name](200, 80)
    again = TASKS[name](200, 80)
    assert torch.equal(task.learned.inputs, again.learned.inputs)
    assert abs(len(task.learned.labels) - 200) < 4
    assert abs(len(task.held_out.labels) - 80) < 4
    for part in task[1:3]:
        assert len(part.inputs) == len(part.labels)
        assert 0 <= part.labels.min() <= part.labels.max() < task.classes
        if task.symbols:
            assert 0 <= part.inputs.min() <= part.inputs.max() < task.symbols
        else:
            assert part.inputs.abs().max() <= 1
    if name in ("digits", "lines"):
        learned = {tuple(row.flatten().tolist()) for row in task.learned.inputs}
        shared = sum(tuple(row.flatten().tolist()) in learned for row in task.held_out.inputs)
        # A line may stand in two files; an image is there once.
        assert shared == 0 if name == "digits" else shared < 10
    # More is more of the same split: nothing that is held out is learned elsewhere.
    if name == "digits":
        everything = TASKS[name](1197, 80)
        assert torch.equal(everything.held_out.inputs, task.held_out.inputs)


def test_corruptions_change_more_the_stronger_they_are() -> None:
    images = TASKS["digits"](100, 100).held_out.inputs
    changes: dict[str, list[float]] = {}
    for kind, strength, found in corrupted(images, 0):
        assert found.shape == images.shape
        assert found.abs().max() <= 1
        changes.setdefault(kind, []).append(float((found - images).square().mean()))
        assert len(changes[kind]) == strength
    assert list(changes) == list(CORRUPTIONS)
    assert all(len(each) == STRENGTHS and each == sorted(each) and each[0] > 0 for each in changes.values())
    same = [torch.equal(a[2], b[2]) for a, b in zip(corrupted(images, 0), corrupted(images, 0), strict=True)]
    assert all(same)


def test_the_scales_are_those_of_the_benchmark() -> None:
    assert len(FULL.settings) == 8
    assert len({(one.optimizer, one.rate) for one in FULL.settings}) == 4
    assert len(FULL.seeds) == 3
    assert QUICK.settings[0] == FULL.settings[0] == Setting()


def test_bad_choices_say_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown track 'tasks'. Did you mean 'task'"):
        follow(measure(Grid(TINY), ["tasks"]), quiet)
    with pytest.raises(UnknownNameError, match="Did you mean 'react'"):
        Grid(TINY, ["reac"])
    with pytest.raises(ConfigError, match=r"Got 'radar.txt'"):
        draw_radar(None, tmp_path / "radar.txt")  # type: ignore[arg-type]
    import importlib

    found = importlib.import_module

    def without(name: str, package: str | None = None) -> object:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return found(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingExtraError, match=r"plait\[bibench\]"):
        TASKS["digits"](10, 10)
