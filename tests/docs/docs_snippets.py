"""The snippets of a Markdown page: what they are, and what it means to run one.

- The `python` blocks of a page run in order, in one namespace. What a block prints stands in a `text`
  block right behind it, where `...` matches anything.
- In a `console` block a line that starts with `$ ` is a command. A `plait` command with output below it
  is run and compared; without output it is only read, so that an option that does not exist is found.
  A `make` command must name a target.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer.main
from typer.testing import CliRunner

from plait.cli.common import read_sampling
from plait.cli.main import app
from plait.decode.speculate import SPECULATORS
from plait.memory import MemoryPlan
from plait.weights import FORMATS

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^( *)(`{3,})([\w{}-]*)[^\n]*\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
_NOT_OURS = ("cat", "cd", "echo", "git", "head", "pip", "printf", "python")


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        language: the word behind the fence.
        line: number of its first line in the page.
        text: its content, without the indentation of the fence.
        output: the `text` block right behind it, or None.
    """

    language: str
    line: int
    text: str
    output: str | None


class Command(NamedTuple):
    """A command of a console block, and what is shown below it."""

    line: int
    words: list[str]
    piped_from: list[str] | None
    output: str


class SnippetError(AssertionError):
    """A snippet does not do what its page says."""


def pages() -> list[str]:
    """Every page with snippets, as a path below the root of the project."""
    written = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    found = [str(page.relative_to(ROOT)) for page in written if "_build" not in page.parts]
    return sorted(page for page in found if blocks_of(page))


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    source = (ROOT / page).read_text("utf-8")
    found = list(_FENCE.finditer(source))
    blocks = []
    for match, following in zip(found, [*found, None][1:], strict=True):
        indent, _, language, text = match.groups()
        text = re.sub(f"^{indent}", "", text, flags=re.MULTILINE)
        output = None
        if following and following[3] == "text" and not source[match.end() : following.start()].strip():
            output = re.sub(f"^{following[1]}", "", following[4], flags=re.MULTILINE)
        blocks.append(Block(language, source[: match.start()].count("\n") + 2, text, output))
    return blocks


def run_python(page: str, block: Block, namespace: dict[str, Any]) -> None:
    """Run a block and compare what it prints with the page."""
    # Empty lines in front make line numbers those of the page.
    code = compile("\n" * (block.line - 1) + block.text, page, "exec", dont_inherit=True)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
    except Exception as error:
        raise SnippetError(f"{page}:{block.line}\n{traceback.format_exc()}") from error
    _compare(page, block.line, block.output or "", printed.getvalue())


def commands_of(block: Block) -> Iterator[Command]:
    """The commands of a console block."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        line = block.line + block.text[: block.text.index(part)].count("\n")
        typed, _, output = part.replace("\\\n", " ").partition("\n")
        before, _, after = typed.rpartition("|")
        words = shlex.split(after)
        # Where a shell sends the output is not the command's.
        words = words[: words.index(">")] if ">" in words else words
        while re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        yield Command(line, words, shlex.split(before) or None, output)


def run_command(page: str, command: Command) -> None:
    """Run a command that shows its output, and check the words of any other."""
    name, *arguments = command.words
    if name == "plait":
        if command.output.strip():
            _run_plait(page, command, arguments)
        else:
            check_arguments(page, command.line, arguments)
    elif name == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
        missing = [word for word in arguments if "=" not in word and word not in targets]
        if missing:
            raise SnippetError(f"{page}:{command.line}: make has no target {missing[0]}")
    elif name not in _NOT_OURS:
        raise SnippetError(f"{page}:{command.line}: nothing is known about {name!r}")


def check_arguments(page: str, line: int, arguments: list[str]) -> None:
    """Check that a command line of `plait` is accepted, without running it."""
    command: Any = typer.main.get_command(app)
    context = None
    name = "plait"
    try:
        while True:
            context = command.make_context(name, list(arguments), parent=context)
            rest = [*getattr(context, "_protected_args", []), *context.args]
            if not getattr(command, "commands", None) or not rest:
                break
            name, command, arguments = command.resolve_command(context, rest)
        _check_specs(context.params)
    except Exception as error:
        message = error.format_message() if hasattr(error, "format_message") else error
        raise SnippetError(f"{page}:{line}: {message}") from error


def _check_specs(parameters: dict[str, Any]) -> None:
    """Read the spec strings among the parameters of a command."""
    if parameters.get("memory"):
        MemoryPlan.parse(parameters["memory"])
    if parameters.get("draft"):
        SPECULATORS.parse(parameters["draft"])
    if (parameters.get("weights") or "file") not in ("file", "auto"):
        FORMATS.parse(parameters["weights"])
    if parameters.get("sampling"):
        read_sampling(parameters["sampling"])


def _run_plait(page: str, command: Command, arguments: list[str]) -> None:
    piped = ""
    if command.piped_from is not None:
        name, *words = command.piped_from
        if name == "cat":
            piped = "".join(Path(word).read_text("utf-8") for word in words)
        elif name == "printf":
            piped = words[0].replace("\\n", "\n")
        else:
            raise SnippetError(f"{page}:{command.line}: only cat and printf are understood before a pipe")
    environment = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "100"}
    result = CliRunner().invoke(app, arguments, input=piped, env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise SnippetError(f"{page}:{command.line}") from result.exception
    _compare(page, command.line, command.output, result.output)


def _compare(page: str, line: int, wanted: str, given: str) -> None:
    wanted, given = (
        "".join(f"{row.rstrip()}\n" for row in text.strip("\n").splitlines()) for text in (wanted, given)
    )
    if not doctest.OutputChecker().check_output(wanted, given, doctest.ELLIPSIS):
        raise SnippetError(f"{page}:{line} should print\n{wanted}\nand prints\n{given}")
