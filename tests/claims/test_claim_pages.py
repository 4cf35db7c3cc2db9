"""The ledger as Markdown: complete, deterministic, and checked against the repository's own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from small_claims import CLAIMS
from typer.testing import Result

from plait.claims import Row, Run, Store, all_claims, full_page, read_ledger, run_claim, short_ledger
from plait.claims.page import BEGIN, END, with_short_ledger
from plait.errors import ConfigError

Program = Callable[..., Result]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def rows() -> list[Row]:
    """One claim that holds, one that failed, one that was never run."""
    results = {name: run_claim(CLAIMS[name], Run(), lambda line: None) for name in ("fast", "broken")}
    return [Row(claim, results.get(name)) for name, claim in CLAIMS.items()]


def test_a_page_says_all_that_was_measured_and_nothing_else(rows: list[Row]) -> None:
    page = full_page(rows)
    assert "speed 12 tokens/s (bar >= 10 tokens/s)" in page
    assert "| speed | 12 tokens/s (11 to 13, 3 samples) |" in page
    assert "| rows | 3 |" in page
    assert "Both sides differ from token 7 on." in page
    assert page.count("**not run here**") == 2
    assert "$ plait claims run slow" in page
    assert str(rows[0].result.machine) in page if rows[0].result else False


def test_every_line_of_a_table_has_the_same_cells(rows: list[Row]) -> None:
    for block in re.findall(r"(?:^\|.*\n)+", full_page(rows), re.MULTILINE):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1


def test_the_same_results_give_the_same_page(program: Program, tmp_path: Path) -> None:
    program("run", "--all")
    pages = [tmp_path / "one.md", tmp_path / "two.md"]
    for path in pages:
        assert program("page", "--output", str(path)).exit_code == 0
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_a_page_is_checked_without_being_written(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    missing = program("page", "--output", str(path), "--check")
    assert missing.exit_code == 1
    assert not path.exists()
    program("page", "--output", str(path))
    assert program("page", "--output", str(path), "--check").exit_code == 0
    program("run", "fast")
    before = path.read_bytes()
    stale = program("page", "--output", str(path), "--check", "--json")
    assert stale.exit_code == 1
    assert json.loads(stale.stdout) == {"file": str(path), "up_to_date": False, "written": False}
    assert "not up to date" in stale.stderr
    assert path.read_bytes() == before


def test_a_page_that_is_up_to_date_is_not_written_again(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    assert json.loads(program("page", "--output", str(path), "--json").stdout)["written"] is True
    before = path.stat().st_mtime_ns
    assert json.loads(program("page", "--output", str(path), "--json").stdout)["written"] is False
    assert path.stat().st_mtime_ns == before


def test_the_short_ledger_stands_between_its_markers(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"# Plait\n\n{BEGIN}\nold\n{END}\n\nThe end.\n", "utf-8")
    program("run", "fast")
    assert program("page", "--short", "--output", str(path)).exit_code == 0
    text = path.read_text("utf-8")
    assert text.startswith(f"# Plait\n\n{BEGIN}\n\n| claim |")
    assert text.endswith(f"\n{END}\n\nThe end.\n")
    assert "\nold\n" not in text
    assert "speed 12 tokens/s" in text
    assert "Measured on: " in text
    assert program("page", "--short", "--output", str(path), "--check").exit_code == 0


def test_the_short_ledger_is_put_in_place_once(rows: list[Row]) -> None:
    once = with_short_ledger(f"a\n{BEGIN}\n{END}\nb\n", rows)
    assert with_short_ledger(once, rows) == once
    assert short_ledger(rows) in once


@pytest.mark.parametrize("text", ["", BEGIN, END + BEGIN, f"{BEGIN}{END}{END}", f"{BEGIN}{BEGIN}{END}"])
def test_a_file_without_its_markers_is_refused(rows: list[Row], text: str) -> None:
    with pytest.raises(ConfigError, match="once each"):
        with_short_ledger(text, rows)


def test_a_page_that_cannot_be_written_is_one_clear_error(program: Program, tmp_path: Path) -> None:
    output = program("page", "--output", str(tmp_path / "no" / "folder" / "page.md"))
    assert output.exit_code == 1
    assert "could not be read or written" in output.stderr


def test_a_page_that_is_no_text_is_one_clear_error(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_bytes(b"\xff\xfe")
    output = program("page", "--output", str(path))
    assert output.exit_code == 1
    assert "is not UTF-8 text" in output.stderr
    assert path.read_bytes() == b"\xff\xfe"


def test_the_page_in_the_docs_is_up_to_date() -> None:
    rows = read_ledger(all_claims().values(), Store(ROOT / "docs" / "claims"))
    assert (ROOT / "docs" / "claims.md").read_text("utf-8") == full_page(rows)
