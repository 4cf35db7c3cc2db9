"""What commands share: options, reading standard input, printing."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.errors import ConfigError

if TYPE_CHECKING:
    from plait.decode import Sampling
    from plait.engine import LanguageModel

__all__ = [
    "Adapter",
    "Draft",
    "Json",
    "Memory",
    "Model",
    "Offline",
    "SamplingSpec",
    "Weights",
    "load_model",
    "print_json",
    "read_bytes",
    "read_file",
    "read_sampling",
    "read_text",
    "say",
    "telling",
]

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        envvar="PLAIT_MODEL",
        help="Alias, folder, .gguf file or hub id.",
        rich_help_panel="Model",
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        "--weights",
        envvar="PLAIT_WEIGHTS",
        help="How matrices are kept: fp32, bf16, q8_0, bitmod:bits=4, ..., file or auto.",
        rich_help_panel="Model",
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        envvar="PLAIT_ADAPTER",
        help="Folder of an adapter to answer with, from plait train adapter or the peft package.",
        rich_help_panel="Model",
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        "--memory",
        envvar="PLAIT_MEMORY",
        help="How the past is kept: full, window:size=1024, dense:dtype=bf16, ...",
        rich_help_panel="Model",
    ),
]
Draft = Annotated[
    str,
    typer.Option(
        "--draft",
        envvar="PLAIT_DRAFT",
        help="How continuations are guessed: none, prompt-lookup, token-recycling, ... Never changes the model's law.",
        rich_help_panel="Model",
    ),
]
Offline = Annotated[
    bool,
    typer.Option("--offline", envvar="PLAIT_OFFLINE", help="Never use the network.", rich_help_panel="Model"),
]
SamplingSpec = Annotated[
    str,
    typer.Option(
        "--sampling",
        "-s",
        help="How tokens are chosen, as key=value,...: temperature, top_k, top_p, min_p, repetition_penalty, "
        "presence_penalty, frequency_penalty, seed. The default is greedy.",
        rich_help_panel="Answer",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def say(text: str) -> None:
    """Print a line on stderr."""
    typer.echo(text, err=True)


@contextmanager
def telling(name: str) -> Iterator[Callable[[str], None]]:
    """How to tell the progress of something on stderr: one changing line on a terminal, else a line each time."""
    if not sys.stderr.isatty():
        yield lambda line: say(f"{name}: {line}")
        return

    # No spinner: the thread that turns it would take time from what is being measured.
    def put(line: str) -> None:
        width = shutil.get_terminal_size().columns
        typer.echo(f"\r\x1b[2K{line[: width - 1]}", err=True, nl=False)

    put(name)
    try:
        yield lambda line: put(f"{name}: {line}")
    finally:
        put("")


def print_json(data: Any) -> None:
    """Print data as JSON on stdout."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def read_text(words: list[str], *, wait: bool) -> str:
    """The text of a command: standard input, if something is piped in, then the words.

    Args:
        words: arguments; `-` stands for standard input.
        wait: read a terminal too when there are no words.

    Raises:
        ConfigError: there is no text, or the input is not UTF-8.
    """
    piped = ""
    if "-" in words or (not sys.stdin.isatty() and _has_input()) or (wait and not words):
        try:
            piped = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"Standard input is not UTF-8 text: {error}. Convert it first.") from None
    said = " ".join(word for word in words if word != "-")
    text = "\n\n".join(part for part in (piped.rstrip("\n"), said) if part)
    if not text:
        raise ConfigError('There is no prompt. Write it as an argument or pipe it in: plait run "Hello".')
    return text


def read_bytes(file: Path) -> bytes:
    """The content of a file; `-` is standard input.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} could not be read: {error.strerror}.") from None


def read_file(file: Path) -> str:
    """The text of a UTF-8 file; `-` is standard input.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        return read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: {error}.") from None


def _has_input() -> bool:
    """Whether standard input is a pipe or a file, rather than absent or a device such as /dev/null."""
    import os
    import stat

    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        # Not a real file, as in a test that gives the text directly.
        return True
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def read_sampling(spec: str) -> Sampling:
    """The sampling that `--sampling` describes; greedy unless it sets a temperature."""
    from plait.decode import Sampling
    from plait.spec import settings_of

    return Sampling.from_settings({"temperature": "0", **settings_of(spec)})


def load_model(
    model: str,
    *,
    weights: str = "auto",
    memory: str = "full",
    draft: str = "none",
    draft_model: str | None = None,
    adapter: Path | None = None,
    offline: bool = False,
) -> LanguageModel:
    """Load a model, with a progress bar for what has to be downloaded."""
    from plait.engine import load
    from plait.hub import RichProgress

    return load(
        Path(model) if Path(model).exists() else model,
        weights=weights,
        memory=memory,
        draft=draft,
        draft_model=draft_model,
        adapter=adapter,
        offline=offline or None,
        progress=RichProgress(),
    )
