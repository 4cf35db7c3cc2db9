"""Tasks on long texts, and what is reported of them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import plait
from plait.cli.main import app
from plait.errors import ConfigError, UnknownNameError
from plait.evaluation import TASKS, Material, Outcome, Report, evaluate, find_tasks

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def lm() -> plait.LanguageModel:
    return plait.load("smollm2")


@pytest.fixture(scope="module")
def material(lm: plait.LanguageModel) -> Material:
    return Material(lm.tokenizer)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.measures])
def test_every_case_has_its_answer_where_it_says_and_the_length_that_was_asked_for(
    material: Material, name: str
) -> None:
    cases = list(TASKS[name].cases(material, random.Random(1), 900, 6))
    again = list(TASKS[name].cases(material, random.Random(1), 900, 6))
    decode = material.tokenizer.decode
    assert cases == again
    assert len({case.answers for case in cases}) > 1
    for case in cases:
        assert 450 < len(case.read) + len(case.asked) <= 900
        assert 0 <= case.depth <= 1
        assert len(set(case.answers)) == len(case.answers)
        text = decode(case.read)
        # A name to be completed is defined in what is read; another answer is said there word by word.
        said = case.answers[0].strip()
        word = said if name != "completion" else re.split(r"\W", said)[0]
        assert word in text
        at = text.index(word) / len(text)
        if name != "completion":
            assert abs(at - case.depth) < 0.15
    if name != "completion":
        assert cases[0].depth < 0.3 < 0.6 < cases[-1].depth


def test_a_case_that_a_length_cannot_hold_is_refused(material: Material) -> None:
    with pytest.raises(ConfigError, match="more than 60 tokens"):
        list(TASKS["documents"].cases(material, random.Random(0), 60, 1))
    with pytest.raises(ConfigError, match="at least"):
        list(TASKS["passkey"].cases(material, random.Random(0), 20, 1))
    with pytest.raises(UnknownNameError, match=r"'needel'.*needle"):
        find_tasks(["needel"])


def test_the_whole_past_finds_a_pass_key_and_a_short_window_does_not(
    lm: plait.LanguageModel, material: Material
) -> None:
    report = Report({})
    steps = evaluate(
        lm,
        ["full", "lm-infinite:local=64,initial=4"],
        find_tasks(["passkey"]),
        lengths=[256],
        count=1,
        material=material,
        report=report,
    )
    assert len(list(steps)) == 2
    full, window = report.summary()
    assert all(one.depth < 0.7 for one in report.outcomes.values())
    assert (full["memory"], full["hit"]) == ("full", 1.0)
    assert (window["memory"], window["hit"]) == ("lm-infinite:local=64,initial=4", 0.0)
    assert window["nats"] > full["nats"] + 1


def test_a_text_is_predicted_as_the_model_predicts_it(lm: plait.LanguageModel, tmp_path: Path) -> None:
    text = " ".join(plait.__doc__ or "") + "The quick brown fox jumps over the lazy dog. " * 40
    file = tmp_path / "text.txt"
    file.write_text(text)
    material = Material.of_files(lm.tokenizer, [file])
    report = Report({})
    for _ in evaluate(
        lm, ["full"], find_tasks(["position"]), lengths=[520], count=1, material=material, report=report
    ):
        pass
    (outcome,) = report.outcomes.values()
    ids = material.prose(random.Random(0), 520)[:520]
    expected = lm.score(lm.tokenizer.decode(ids), context=520)
    assert expected.tokens == 519
    assert outcome.nats == pytest.approx(expected.nats / expected.tokens, rel=1e-4)
    assert len(outcome.curve) == 2


def test_what_was_measured_is_not_measured_again(
    tmp_path: Path, lm: plait.LanguageModel, material: Material
) -> None:
    path = tmp_path / "long.json"
    report = Report.open(path, {"model": "m"})
    steps = evaluate(
        lm, ["full"], find_tasks(["needle"]), lengths=[128], count=2, material=material, report=report
    )
    next(steps)
    report.save(path)
    steps.close()
    resumed = Report.open(path, {"model": "m"})
    assert resumed.outcomes == report.outcomes
    told = [
        line
        for line, _ in evaluate(
            lm, ["full"], find_tasks(["needle"]), lengths=[128], count=2, material=material, report=resumed
        )
    ]
    assert [line.split("case ")[1][0] for line in told] == ["2"]
    whole = Report({})
    for _ in evaluate(
        lm, ["full"], find_tasks(["needle"]), lengths=[128], count=2, material=material, report=whole
    ):
        pass
    assert [(one.hit, one.nats) for one in whole.outcomes.values()] == [
        (one.hit, one.nats) for one in resumed.outcomes.values()
    ]
    with pytest.raises(ConfigError, match="was made with"):
        Report.open(path, {"model": "another"})
    path.write_text("[]")
    with pytest.raises(ConfigError, match="no report"):
        Report.open(path, {"model": "m"})


def test_the_command_prints_a_table_json_and_a_picture(tmp_path: Path) -> None:
    picture, results = tmp_path / "long.svg", tmp_path / "long.json"
    shared = [
        "eval",
        "long",
        "full",
        "--task",
        "needle",
        "--task",
        "position",
        "--length",
        "256",
        "--count",
        "1",
    ]
    shared += ["--results", str(results)]
    done = CliRunner().invoke(app, [*shared, "--picture", str(picture)], env={"NO_COLOR": "1"})
    assert done.exit_code == 0, done.output
    assert "needle" in done.stdout
    assert picture.read_text().count("</svg>") == 1
    printed = CliRunner().invoke(app, [*shared, "--json"])
    assert json.loads(printed.stdout) == json.loads(results.read_text())
    assert {row["task"] for row in json.loads(printed.stdout)["summary"]} == {"needle", "position"}
    wrong = CliRunner().invoke(app, [*shared, "--picture", str(tmp_path / "long.gif")])
    assert wrong.exit_code == 1
    few = CliRunner().invoke(app, ["eval", "long", "full", "--length", "20"])
    assert few.exit_code == 1
    assert "at least 128" in few.stderr


def test_a_memory_that_cannot_hold_a_case_says_so(lm: plait.LanguageModel, material: Material) -> None:
    report = Report({})
    outcome = Outcome("position", "full", 9000, 0)
    for _ in evaluate(
        lm, ["full"], find_tasks(["position"]), lengths=[9000], count=1, material=material, report=report
    ):
        pass
    assert "context of 8192" in report.outcomes[outcome.key].refused
    assert report.summary()[0]["refused"]


def test_files_without_text_are_refused(lm: plait.LanguageModel, tmp_path: Path) -> None:
    files = [tmp_path / "a.md", tmp_path / "b.txt"]
    for file in files:
        file.write_text(" \n")
    with pytest.raises(ConfigError, match=r"no text in .*b\.txt"):
        Material.of_files(lm.tokenizer, files)
    files[0].write_text("Some text.")
    found = Material.of_files(lm.tokenizer, files)
    assert len(found.prose(random.Random(1), 64)) >= 64
