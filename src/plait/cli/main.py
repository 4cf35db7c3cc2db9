"""The `plait` program."""

from __future__ import annotations

import os
import sys
from typing import Any

import click
import typer
import typer.core

from plait import __version__
from plait.cli import claims, generate, methods, models
from plait.cli.common import say
from plait.errors import PlaitError

__all__ = ["app", "main"]


class DefaultGroup(typer.core.TyperGroup):
    """A group in which `plait "prompt"` means `plait run "prompt"`."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None and " " in args[0]:
            args = ["run", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=DefaultGroup,
    name="plait",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Efficient sequence models on your own machine. A prompt alone runs it: plait \"Why is the sky blue?\"",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"plait {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    return None


app.command("run")(generate.run)
app.command("chat")(generate.chat)
app.command("score")(generate.score)
app.command("pull")(models.pull)
app.command("models")(models.models)
app.command("info")(models.info)
app.command("methods")(methods.methods)
app.add_typer(claims.app, name="claims")


def main(arguments: list[str] | None = None) -> None:
    """Run the program and exit: 0 success, 1 failure, 2 wrong usage, 130 interrupted."""
    try:
        app(args=arguments, standalone_mode=False)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        say("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone; nothing is left to say, also when Python closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except PlaitError as error:
        say(f"error: {error}")
        sys.exit(1)
