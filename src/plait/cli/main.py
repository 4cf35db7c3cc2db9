"""The `plait` program."""

from __future__ import annotations

from typing import Any

import typer
import typer.core

from plait import __version__
from plait.cli import (
    adapters,
    bench,
    claims,
    evaluate,
    generate,
    methods,
    models,
    pac,
    train,
    watermark,
    weights,
)
from plait.cli import bytes as byte_laws
from plait.cli import serve as serving
from plait.cli.common import say
from plait.errors import PlaitError

__all__ = ["app", "main"]


class Program(typer.core.TyperGroup):
    """The group of all commands; `plait "some prompt"` means `plait run "some prompt"`.

    Errors end in one line on stderr: exit 1 for a failure, 2 for wrong usage, 130 when interrupted.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and " " in args[0] and self.get_command(ctx, args[0]) is None:
            args = ["run", *args]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(130) from None
        except PlaitError as error:
            say(f"error: {error}")
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Program,
    name="plait",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help='Efficient sequence models on your own machine. A prompt alone runs it: plait "Why is the sky blue?"',
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"plait {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    return None


app.command("run")(generate.run)
app.command("chat")(generate.chat)
app.command("score")(generate.score)
app.command("bytes")(byte_laws.next_bytes)
app.command("serve")(serving.serve)
app.command("pull")(models.pull)
app.command("models")(models.models)
app.command("info")(models.info)
app.command("quantize")(weights.quantize)
app.command("methods")(methods.methods)
app.add_typer(evaluate.app, name="eval")
app.add_typer(train.app, name="train")
app.add_typer(adapters.app, name="adapters")
app.add_typer(watermark.app, name="watermark")
app.add_typer(pac.app, name="pac")
app.add_typer(bench.app, name="bench")
app.add_typer(claims.app, name="claims")


def main() -> None:
    """Run the program on the arguments of this process, and exit."""
    app(prog_name="plait")
