"""Claims, their verdicts, and the files that results are kept in."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from small_claims import CLAIMS, claim_of, speed_of

from plait.claims import Bar, Claim, Machine, Measurements, Quantity, Result, Row, Run, Store, run_claim
from plait.errors import ConfigError, DownloadError, MissingExtraError


def ignore(line: str) -> None:
    """Progress that nobody reads."""


def result_of(name: str) -> Result:
    return run_claim(CLAIMS[name], Run(), ignore)


def test_a_claim_that_reaches_its_bar_holds() -> None:
    result = result_of("fast")
    assert result.verdict == "holds"
    assert result.quantities["speed"] == Quantity(12.0, "tokens/s", (11.0, 13.0), 3)
    assert result.error is None


def test_a_claim_below_its_bar_misses() -> None:
    assert result_of("slow").verdict == "misses"


@pytest.mark.parametrize(("relation", "verdict"), [(">=", "holds"), ("<=", "holds")])
def test_a_quantity_on_the_bar_reaches_it(relation: str, verdict: str) -> None:
    bar = Bar(quantity="speed", relation=relation, value=10.0, unit="tokens/s", why="It is a limit.")
    claim = dataclasses.replace(claim_of("even", speed_of(10.0)), bars=(bar,))
    assert run_claim(claim, Run(), ignore).verdict == verdict


def test_an_upper_bar_is_missed_from_above() -> None:
    bar = Bar(quantity="speed", relation="<=", value=9.9, unit="tokens/s", why="It is a limit.")
    claim = dataclasses.replace(claim_of("even", speed_of(10.0)), bars=(bar,))
    assert run_claim(claim, Run(), ignore).verdict == "misses"


def test_a_claim_that_raises_has_failed_with_one_sentence_and_no_number() -> None:
    result = result_of("broken")
    assert result.verdict == "failed"
    assert result.error == "Both sides differ from token 7 on."
    assert result.quantities == {}
    assert result.judgements == ()


def test_an_unforeseen_error_names_its_kind_and_keeps_to_one_line() -> None:
    def measure(run: Run) -> Measurements:
        yield "before"
        raise ZeroDivisionError("first line\nsecond line")

    result = run_claim(claim_of("odd", measure), Run(), ignore)
    assert result.error == "ZeroDivisionError: first line"


@pytest.mark.parametrize(
    ("quantities", "message"),
    [
        ({}, "speed has a bar but was not measured."),
        ({"speed": Quantity(11.0, "m/s")}, "its bar is in 'tokens/s'"),
        ({"speed": Quantity(math.nan, "tokens/s")}, "not a finite number"),
        ({"speed": Quantity(11.0, "tokens/s", (1.0, math.inf))}, "not a finite number"),
        ({"speed": Quantity(11.0, "tokens/s"), "other": Quantity(math.inf, "")}, "other was measured as inf"),
    ],
)
def test_what_was_not_measured_cannot_be_judged(quantities: dict[str, Quantity], message: str) -> None:
    def measure(run: Run) -> Measurements:
        yield "before"
        return quantities

    result = run_claim(claim_of("odd", measure), Run(), ignore)
    assert result.verdict == "failed"
    assert message in str(result.error)


def test_progress_is_told_in_order() -> None:
    lines: list[str] = []
    run_claim(CLAIMS["fast"], Run(), lines.append)
    assert lines == ["half way"]


def test_a_part_that_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    run = Run(parts=tmp_path / "parts")
    asked = []

    def measure(value: float) -> dict[str, Quantity]:
        asked.append(value)
        return {"speed": Quantity(value, "x", (1.0, 2.5), 3)}

    first = run.once("speed", measure, 2.0)
    assert (
        first == run.once("speed", measure, 7.0) == Run(parts=tmp_path / "parts").once("speed", measure, 8.0)
    )
    assert asked == [2.0]
    assert Run().once("speed", measure, 4.0)["speed"].value == 4.0
    (tmp_path / "parts" / "speed.json").write_text("{")
    with pytest.raises(ConfigError, match=r"is damaged\. Remove it"):
        run.once("speed", measure, 2.0)


def test_a_missing_package_is_not_a_failed_claim() -> None:
    claim = dataclasses.replace(CLAIMS["fast"], needs=("no_such_module",))
    with pytest.raises(MissingExtraError, match=r"The claim fast needs no_such_module.*plait\[test\]"):
        run_claim(claim, Run(), ignore)


def test_a_missing_model_is_not_a_failed_claim() -> None:
    def measure(run: Run) -> Measurements:
        yield "before"
        raise DownloadError("No network.")

    with pytest.raises(DownloadError):
        run_claim(claim_of("far", measure), Run(), ignore)


def test_an_interrupt_is_not_a_failed_claim() -> None:
    def measure(run: Run) -> Measurements:
        yield "before"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_claim(claim_of("long", measure), Run(), ignore)


def test_a_result_states_the_machine_it_was_measured_on() -> None:
    machine = result_of("fast").machine
    assert machine == Machine.this()
    assert machine.processor
    assert machine.cores >= 1
    assert machine.threads >= 1
    assert machine.packages["torch"] == importlib.metadata.version("torch")
    assert "transformers" in machine.packages
    assert all(str(fact) in str(machine) for fact in (machine.processor, machine.python, machine.system))


def test_native_operations_can_be_seen_to_be_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_NATIVE", "0")
    assert Machine.this().native is False


@pytest.mark.parametrize("name", ["Upper", "under_score", "", "-x", "a--b", "../up"])
def test_a_claim_needs_a_plain_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"Claim\.name"):
        claim_of(name, speed_of(1.0))


def test_a_claim_needs_bars_and_each_once() -> None:
    claim = CLAIMS["fast"]
    for bars in ((), claim.bars * 2):
        with pytest.raises(ConfigError, match="at least one bar"):
            dataclasses.replace(claim, bars=bars)


def test_a_median_keeps_spread_and_count() -> None:
    assert Quantity.median([3.0, 1.0, 2.0, 10.0], "s") == Quantity(2.5, "s", (1.0, 10.0), 4)


@pytest.mark.parametrize("name", ["fast", "slow", "broken"])
def test_a_result_survives_the_file(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path / "made" / "here")
    result = result_of(name)
    path = store.write(result)
    assert store.read(CLAIMS[name]) == result
    assert json.loads(path.read_text("utf-8"))["verdict"] == result.verdict
    assert sorted(path.parent.iterdir()) == [path]


def test_a_claim_never_run_has_no_result(tmp_path: Path) -> None:
    assert Store(tmp_path / "nowhere").read(CLAIMS["fast"]) is None


def test_a_quick_run_is_marked_and_never_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    result = run_claim(CLAIMS["fast"], Run(quick=True), ignore)
    assert result.to_json()["result"]["quick"] is True
    with pytest.raises(ConfigError, match="not kept"):
        store.write(result)
    store.path("fast").write_text(result.text(), "utf-8")
    with pytest.raises(ConfigError, match="is a quick run of fast"):
        store.read(CLAIMS["fast"])


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", "utf-8")
    with pytest.raises(ConfigError, match="could not be written"):
        Store(tmp_path / "file").write(result_of("fast"))


def swap(old: str, new: str) -> Callable[[str], str]:
    """A damage that replaces one piece of a result file."""

    def damage(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return damage


DAMAGES = {
    "empty": lambda text: "",
    "cut short": lambda text: text[: len(text) // 2],
    "not JSON": lambda text: "once upon a time",
    "not an object": lambda text: "[1, 2]",
    "null": lambda text: "null",
    "nested without end": lambda text: "[" * 100_000,
    "another schema": swap('"schema": 1', '"schema": 2'),
    "a field too many": swap('"quick": false', '"quick": false, "trust": "me"'),
    "a field missing": swap('"quick": false,', ""),
    "a number as text": swap('"value": 12.0', '"value": "12.0"'),
    "not a number": swap('"value": 12.0', '"value": NaN'),
    "an endless number": swap('"value": 12.0', '"value": 1e999'),
    "a better verdict on a bar": swap('"holds": true', '"holds": false'),
    "a better verdict": swap('"verdict": "holds"', '"verdict": "misses"'),
    "a number that does not reach the bar": swap('"value": 12.0', '"value": 9.0'),
    "no such relation": swap('"relation": ">="', '"relation": "=="'),
    "another claim": swap('"claim": "fast"', '"claim": "slow"'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_result_is_one_clear_error(tmp_path: Path, damage: Callable[[str], str]) -> None:
    store = Store(tmp_path)
    path = store.write(result_of("fast"))
    path.write_text(damage(path.read_text("utf-8")), "utf-8")
    with pytest.raises(ConfigError) as error:
        store.read(CLAIMS["fast"])
    message = str(error.value)
    assert message.startswith(str(path))
    assert message.endswith("plait claims run fast")
    assert "\n" not in message
    assert len(message) < 1000


def test_bytes_that_are_no_text_are_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "fast.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a result of a claim"):
        Store(tmp_path).read(CLAIMS["fast"])


def test_a_result_without_any_bar_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    document = result_of("fast").to_json()
    document["result"]["judgements"] = []
    store.path("fast").write_text(json.dumps(document), "utf-8")
    with pytest.raises(ConfigError, match="does not follow from the bars"):
        store.read(CLAIMS["fast"])


def test_a_result_of_other_bars_or_another_scale_is_outdated() -> None:
    claim, result = CLAIMS["fast"], result_of("fast")
    raised = dataclasses.replace(claim, bars=(dataclasses.replace(claim.bars[0], value=11.0),))
    larger = dataclasses.replace(claim, scale="A track of 200 m.")
    assert Row(claim, result).state == "holds"
    assert Row(raised, result).state == "outdated"
    assert Row(larger, result).state == "outdated"
    assert Row(larger, None).state == "not run here"


def test_a_failed_run_stays_failed_in_the_ledger() -> None:
    assert Row(CLAIMS["broken"], result_of("broken")).state == "failed"


def test_a_claim_is_data_with_a_function() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CLAIMS["fast"].name = "other"  # type: ignore[misc]
    assert isinstance(CLAIMS["fast"], Claim)
