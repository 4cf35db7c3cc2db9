"""The reference of the command line is what the program says."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import typer.main
from docs_snippets import ROOT

from plait.cli.main import app


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    """docs/cli_reference.py, which is a script."""
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "docs" / "cli_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(writer: ModuleType) -> None:
    assert writer.PAGE.read_text("utf-8") == writer.page(), "Run python docs/cli_reference.py"


def test_every_command_and_option_is_on_the_page(writer: ModuleType) -> None:
    page = writer.page()
    for name, command in vars(typer.main.get_command(app))["commands"].items():
        assert f"## plait {name}\n" in page
        for parameter in command.params:
            assert all(f"`{spelling}`" in page for spelling in parameter.opts)
