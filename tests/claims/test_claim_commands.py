"""The `claims` commands: what users see, what is kept, how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_claims import CLAIMS, claim_of, only
from typer.testing import CliRunner, Result

import plait.claims
from plait.claims import Measurements, Quantity, Run, Store, run_claim
from plait.cli.main import app
from plait.errors import MissingExtraError

Program = Callable[..., Result]


def test_the_ledger_says_what_was_never_run(program: Program) -> None:
    output = program()
    assert output.exit_code == 0
    assert output.stdout.count("not run here") == 3
    assert all(name in output.stdout for name in CLAIMS)


def test_the_ledger_shows_what_was_run(program: Program) -> None:
    program("run", "fast", "slow")
    output = program()
    assert output.exit_code == 0
    assert "holds" in output.stdout
    assert "misses" in output.stdout
    assert output.stdout.count("not run here") == 1
    assert "12" in output.stdout


def test_the_ledger_is_data_too(program: Program) -> None:
    program("run", "fast")
    rows = {row["claim"]: row for row in json.loads(program("--json").stdout)}
    assert list(rows) == sorted(CLAIMS)
    assert rows["fast"]["state"] == "holds"
    assert rows["fast"]["result"]["quantities"]["speed"]["value"] == 12.0
    assert rows["slow"] == {**rows["slow"], "state": "not run here", "result": None}


def test_a_claim_that_holds_exits_0_and_is_kept(program: Program, tmp_path: Path) -> None:
    output = program("run", "fast")
    assert output.exit_code == 0
    assert "fast: holds" in output.stdout
    assert "12 tokens/s (11 to 13, 3 samples)  bar >= 10 tokens/s" in output.stdout
    assert output.stderr == "fast: half way\n"
    assert Store(tmp_path / "results").read(CLAIMS["fast"]) is not None


@pytest.mark.parametrize(
    ("name", "verdict"), [("slow", "misses"), ("broken", "failed\n  Both sides differ from token 7 on.")]
)
def test_a_claim_that_does_not_hold_exits_1_and_is_kept(
    program: Program, tmp_path: Path, name: str, verdict: str
) -> None:
    output = program("run", name)
    assert output.exit_code == 1
    assert f"{name}: {verdict}" in output.stdout
    assert Store(tmp_path / "results").read(CLAIMS[name]) is not None


def test_all_claims_are_run_even_when_the_first_fails(program: Program) -> None:
    output = program("run", "--all", "--json")
    assert output.exit_code == 1
    verdicts = {entry["result"]["claim"]: entry["verdict"] for entry in json.loads(output.stdout)}
    assert verdicts == {"broken": "failed", "fast": "holds", "slow": "misses"}


def test_a_quick_run_says_so_and_keeps_nothing(program: Program, tmp_path: Path) -> None:
    output = program("run", "fast", "--quick")
    assert output.exit_code == 0
    assert "fast: holds (quick run)" in output.stdout
    assert "prove nothing" in output.stderr
    assert not (tmp_path / "results").exists()
    assert json.loads(program("run", "fast", "--quick", "--json").stdout)[0]["result"]["quick"] is True


@pytest.mark.parametrize("arguments", [["run"], ["run", "fast", "--all"]])
def test_run_wants_names_or_all(program: Program, arguments: list[str]) -> None:
    output = program(*arguments)
    assert output.exit_code == 2
    assert "--all" in output.stderr


@pytest.mark.parametrize("command", ["run", "show"])
def test_an_unknown_claim_is_refused_with_a_suggestion(program: Program, command: str) -> None:
    output = program(command, "fsat")
    assert output.exit_code == 1
    assert "Unknown claim 'fsat'. Did you mean 'fast'?" in output.stderr


def test_an_unknown_name_is_refused_before_anything_is_run(program: Program, tmp_path: Path) -> None:
    assert program("run", "fast", "nonsense").exit_code == 1
    assert not (tmp_path / "results").exists()


def test_a_claim_that_lacks_a_package_does_not_stop_the_others(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_or_miss(
        claim: plait.claims.Claim, run: Run, progress: Callable[[str], None]
    ) -> plait.claims.Result:
        if claim.name == "broken":
            raise MissingExtraError(
                "The claim broken needs a peer. Install it with: pip install 'plait[test]'"
            )
        return run_claim(claim, run, progress)

    monkeypatch.setattr(plait.claims, "run_claim", run_or_miss)
    output = program("run", "broken", "fast")
    assert output.exit_code == 1
    assert "error: The claim broken needs a peer." in output.stderr
    assert "fast: holds" in output.stdout


def test_show_tells_the_bars_and_why_and_the_last_result(program: Program) -> None:
    before = program("show", "fast")
    assert before.exit_code == 0
    assert "bar      speed >= 10 tokens/s. Hares sleep." in before.stdout
    assert "verdict  not run here" in before.stdout
    program("run", "fast")
    after = program("show", "fast")
    assert "verdict  holds" in after.stdout
    assert "12 tokens/s (11 to 13, 3 samples)" in after.stdout
    assert json.loads(program("show", "fast", "--json").stdout)["state"] == "holds"


@pytest.mark.parametrize("arguments", [[], ["show", "fast"], ["page", "--output", "page.md"]])
def test_a_damaged_result_is_one_line_on_stderr(
    program: Program, tmp_path: Path, arguments: list[str]
) -> None:
    program("run", "fast")
    path = tmp_path / "results" / "fast.json"
    path.write_text("{", "utf-8")
    output = program(*arguments)
    assert output.exit_code == 1
    assert output.stdout == ""
    assert output.stderr.startswith(f"error: {path} is not a result of a claim")
    assert output.stderr.count("\n") == 1


def test_running_again_repairs_a_damaged_result(program: Program, tmp_path: Path) -> None:
    program("run", "fast")
    (tmp_path / "results" / "fast.json").write_text("{", "utf-8")
    assert program("run", "fast").exit_code == 0
    assert "verdict  holds" in program("show", "fast").stdout


def test_an_option_chooses_the_folder_of_results(program: Program, tmp_path: Path) -> None:
    chosen = tmp_path / "chosen"
    assert program("run", "fast", "--results", str(chosen)).exit_code == 0
    assert (chosen / "fast.json").exists()
    assert "holds" in program("--results", str(chosen)).stdout
    assert "holds" not in program().stdout


def test_results_are_kept_in_the_users_data_folder_when_nothing_else_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PLAIT_CLAIMS", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with only(CLAIMS):
        assert CliRunner().invoke(app, ["claims", "run", "fast"], env={"NO_COLOR": "1"}).exit_code == 0
    assert len(list(tmp_path.rglob("claims/fast.json"))) == 1


@pytest.mark.parametrize("command", ["run", "show", "page"])
def test_every_command_explains_itself_with_an_example(program: Program, command: str) -> None:
    output = program(command, "--help")
    assert output.exit_code == 0
    assert f"plait claims {command}" in output.stdout


def test_an_interrupted_run_goes_on_with_the_parts_that_it_kept(tmp_path: Path) -> None:
    found: list[list[str]] = []

    def measure(run: Run) -> Measurements:
        assert run.parts is not None
        run.parts.mkdir(parents=True, exist_ok=True)
        found.append(sorted(path.name for path in run.parts.iterdir()))
        (run.parts / f"part {len(found)}").write_text("done")
        yield "measuring"
        if len(found) == 1:
            raise KeyboardInterrupt
        return {"speed": Quantity(12.0, "tokens/s")}

    call = ["claims", "run", "long", "--results", str(tmp_path)]
    with only({"long": claim_of("long", measure), "longer": claim_of("longer", measure)}):
        assert CliRunner().invoke(app, call).exit_code == 130
        other = Store(tmp_path).parts(claim_of("longer", measure))
        other.mkdir(parents=True)
        output = CliRunner().invoke(app, call)
        assert output.exit_code == 0
        assert "going on where an earlier run stopped" in output.stderr
    assert found == [[], ["part 1"]]
    assert list((tmp_path / ".parts").iterdir()) == [other]


INTERRUPTED = """
import signal, sys, time
# Where the tests themselves run in the background, Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {here!r})
from small_claims import claim_of, only
from plait.cli.main import main

def measure(run):
    yield "measuring"
    time.sleep(60)

sys.argv = ["plait", "claims", "run", "fast"]
with only({{"fast": claim_of("fast", measure)}}):
    main()
"""


def test_ctrl_c_leaves_the_old_result_whole_and_exits_130(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old = store.write(run_claim(CLAIMS["fast"], Run(), lambda line: None)).read_bytes()
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED.format(here=str(Path(__file__).parent))],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PLAIT_CLAIMS": str(tmp_path)},
    )
    assert child.stderr is not None
    assert child.stderr.readline() == "fast: measuring\n"
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=30)
    assert child.returncode == 130
    assert stdout == ""
    assert "fast was not measured" in stderr
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == [store.path("fast")]
    assert store.path("fast").read_bytes() == old


ON_A_TERMINAL = """
import sys
sys.path.insert(0, {here!r})
from small_claims import CLAIMS, only
from plait.cli.main import main

sys.argv = ["plait", "claims", "run", "fast", "--quick"]
with only(CLAIMS):
    main()
"""


def test_progress_on_a_terminal_is_one_line_that_is_wiped_at_the_end() -> None:
    import pty

    ours, theirs = pty.openpty()
    child = subprocess.run(
        [sys.executable, "-c", ON_A_TERMINAL.format(here=str(Path(__file__).parent))],
        stderr=theirs,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    wipe = "\r\x1b[2K"
    assert shown.startswith(f"{wipe}fast{wipe}fast: half way{wipe}Quick runs")
    assert child.stdout.startswith("fast: holds (quick run)")
