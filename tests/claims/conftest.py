"""The command line on small claims."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_claims import CLAIMS, only
from typer.testing import CliRunner, Result

from plait.cli.main import app


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., Result]]:
    """`plait claims ...` on the small claims, with results in a folder of the test."""

    def call(*arguments: str) -> Result:
        environment = {"PLAIT_CLAIMS": str(tmp_path / "results"), "NO_COLOR": "1", "COLUMNS": "120"}
        return CliRunner().invoke(app, ["claims", *arguments], env=environment)

    with only(CLAIMS):
        yield call
