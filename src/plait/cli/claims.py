"""The `claims` commands: the ledger of what is claimed and what was measured on this machine."""

from __future__ import annotations

import typer

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=False,
    help="What Plait claims, beside what was measured on this machine.",
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def ledger() -> None:
    """Print the ledger of claims."""
    from plait.claims import cards

    typer.echo("\n".join(cards.__all__))
