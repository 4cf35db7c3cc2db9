"""What pages say about the code is true: names resolve, files and tests exist, tables agree with the program."""

from __future__ import annotations

import dataclasses
import importlib
import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grimp
import pytest
from docs_snippets import ROOT

from plait.claims import with_short_ledger
from plait.decode.speculate import SPECULATORS
from plait.memory import CODECS, POLICIES
from plait.nn.config import MIXERS
from plait.nn.distance_bias import BIASES
from plait.weights import FORMATS

PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    if "_build" not in page.parts
)
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
METHODS = ROOT / "docs" / "methods"


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", (ROOT / page).read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def resolve(name: str) -> Any:
    """The object behind a dotted name."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("page", PAGES)
def test_names_of_the_package_resolve(page: str) -> None:
    names = re.findall(r"`(plait(?:\.\w+)+)", prose(page))
    names += re.findall(r"^\.\. auto\w+:: (\S+)", (ROOT / page).read_text("utf-8"), flags=re.MULTILINE)
    for name in names:
        assert resolve(name) is not None


@pytest.mark.parametrize("page", PAGES)
def test_paths_and_tests_that_are_named_exist(page: str) -> None:
    for path in re.findall(r"`((?:src|tests|docs)/[^`\s]*)`", prose(page)):
        path, _, test = path.partition("::")
        path = path.removesuffix("/NAME.py").removesuffix("/NAME.md")
        assert (ROOT / path).exists(), f"{page} names {path}"
        if test:
            assert f"def {test}(" in (ROOT / path).read_text("utf-8"), f"{page} names {test}"


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_somewhere(page: str) -> None:
    text = prose(page)
    targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for target in targets:
        if not target.startswith(("http://", "https://")):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("script", sorted((ROOT / "docs").rglob("*.py")), ids=lambda path: path.stem)
def test_scripts_that_make_pages_and_pictures_can_be_imported(script: Path) -> None:
    runpy.run_path(str(script), run_name="imported")


def test_the_picture_of_weights_reads_its_measurements() -> None:
    rows = runpy.run_path(str(ROOT / "docs/images/weights.py"), run_name="imported")["rows"]()
    assert len(rows) > 1
    assert all(row.held_bytes > 0 for row in rows)


def rows_of(text: str, heading: str) -> Iterator[list[str]]:
    """The cells of the first table behind a heading, without its head."""
    section = f"\n{text}".partition(f"\n{heading}\n")[2]
    lines = re.findall(r"^\|(.*)\|$", section.partition("\n## ")[0], flags=re.MULTILINE)
    for line in lines[2:]:
        yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]


def imports_of_rooms() -> dict[str, set[str]]:
    """Which rooms each room imports."""
    graph = grimp.build_graph("plait")
    found: dict[str, set[str]] = {}
    for module in graph.modules - {"plait"}:
        room = module.split(".")[1]
        others = {
            other.split(".")[1]
            for other in graph.find_modules_directly_imported_by(module)
            if other.count(".")
        }
        found.setdefault(room, set()).update(others - {room})
    return found


def test_the_table_of_rooms_is_what_they_import() -> None:
    table = {
        room.strip("`"): set(filter(None, imports.split(", ")))
        for room, _, imports in rows_of(ARCHITECTURE, "## The rooms")
    }
    assert table == imports_of_rooms()


def test_the_layers_are_those_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    listed = re.search(r"Layers, from the top.*?```text\n(.*?)```", ARCHITECTURE, flags=re.DOTALL)
    assert listed is not None
    assert listed[1].splitlines() == [layer.replace("plait.", "") for layer in layers]


def test_every_method_has_a_page_and_a_row() -> None:
    axes = (CODECS, POLICIES, FORMATS, SPECULATORS, MIXERS, BIASES)
    names = {name for axis in axes for name in axis.names()}
    pages: dict[str, str] = {}
    for cells in rows_of((METHODS / "index.md").read_text("utf-8"), "# Methods"):
        linked = re.fullmatch(r"\[(.*)\]\((.*)\)", cells[0])
        assert linked is not None
        pages |= dict.fromkeys(re.findall(r"`([^`]+)`", linked[1]), linked[2])
    assert pages.keys() == names
    for name, page in pages.items():
        assert f"`{name}`" in (METHODS / page).read_text("utf-8") or page == f"{name}.md"


@pytest.mark.parametrize(
    "page", sorted(path.name for path in METHODS.glob("*.md") if path.name != "index.md")
)
def test_a_page_of_a_method_says_when_and_what_it_costs(page: str) -> None:
    text = (METHODS / page).read_text("utf-8")
    for heading in ("When to use it", "When not", "Cost", "Example"):
        assert f"\n## {heading}\n" in text


def test_the_settings_of_methods_are_on_their_pages() -> None:
    for axis in (CODECS, POLICIES, SPECULATORS):
        for name, method in axis.methods.items():
            for field in dataclasses.fields(method):  # type: ignore[arg-type]
                # Plain decoding is told beside the first draft.
                file = "prompt-lookup.md" if name == "none" else f"{name}.md"
                page = (METHODS / file).read_text("utf-8").replace("`", "")
                default = " " if field.default is dataclasses.MISSING else f" {field.default} "
                assert f"| {field.name} |{default}|" in page


def test_every_promise_names_a_test_or_what_it_waits_for() -> None:
    security = (ROOT / "SECURITY.md").read_text("utf-8")
    promises = re.findall(r"^### (\d)\. (.*?)(?=^##)", security, flags=re.MULTILINE | re.DOTALL)
    assert [number for number, _ in promises] == list("1234567")
    for number, promise in promises:
        assert "- `tests/" in promise, f"promise {number} names no test"


def test_the_readme_has_a_place_for_the_ledger() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "| claim | measured | verdict |" in with_short_ledger(readme, [])
