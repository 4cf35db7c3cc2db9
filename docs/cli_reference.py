"""Write the reference of the command line, docs/reference/cli.md, from the program itself.

A test compares the page with the program: run `python docs/cli_reference.py` after a change of either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from plait.cli.main import app
from plait.files import write_text

PAGE = Path(__file__).parent / "reference" / "cli.md"

HEAD = """\
<!-- Written by docs/cli_reference.py; do not edit. -->

# Command line

Results go to standard output, everything else to standard error. The exit status is 0 for success,
1 for a failure, 2 for wrong usage and 130 when interrupted. `NO_COLOR` is respected.
"""


def page() -> str:
    """The whole page as Markdown."""
    return HEAD + "".join(_section("plait", typer.main.get_command(app), level=2))


def _section(name: str, command: Any, level: int) -> Iterator[str]:
    """A heading for one command, what it does, its parameters; then its own commands."""
    yield f"\n{'#' * level} {name}\n"
    if command.help:
        yield f"\n{_prose(command.help)}\n"
    parameters = [parameter for parameter in command.params if not parameter.hidden]
    for title, kind in (("argument", "argument"), ("option", "option")):
        rows = [_row(parameter) for parameter in parameters if parameter.param_type_name == kind]
        if rows:
            yield f"\n| {title} | meaning |\n| --- | --- |\n" + "".join(rows)
    for child in getattr(command, "commands", {}).values():
        if not child.hidden:
            yield from _section(f"{name} {child.name}", child, min(level + 1, 4) if level > 2 else 2)


def _prose(text: str) -> str:
    """Help text as Markdown: its examples become a block of commands."""
    about, _, examples = text.replace("[bold]Examples[/bold]", "\0").partition("\0")
    about = re.sub(r"\[/?bold\]", "**", about.strip())
    if not examples:
        return about
    lines = [f"$ {line.strip()}" for line in examples.splitlines() if line.strip()]
    return "\n".join([about, "", "```console", *lines, "```"])


def _row(parameter: Any) -> str:
    """One row of a table of parameters."""
    if parameter.param_type_name == "argument":
        names = f"`{parameter.name}`" + ("" if parameter.required else ", may be left out")
    else:
        names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    words = [re.sub(r"([|<>*])", r"\\\1", parameter.help or "")]
    is_switch = getattr(parameter, "is_flag", False)
    if not is_switch and parameter.default not in (None, "", ()) and not callable(parameter.default):
        words.append(f"Default: `{parameter.default}`.")
    if parameter.envvar:
        words.append(f"Environment variable: `{parameter.envvar}`.")
    return f"| {names} | {' '.join(words)} |\n"


if __name__ == "__main__":
    write_text(PAGE, page())
