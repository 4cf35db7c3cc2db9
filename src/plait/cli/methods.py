"""The `methods` command: what can be chosen on each axis."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer

from plait.cli.common import Json, print_json
from plait.errors import UnknownNameError, suggestion
from plait.spec import Spec

__all__ = ["methods"]


def methods(
    axis: Annotated[
        str | None,
        typer.Argument(
            help="codecs, policies, weights, drafts, mixers, objectives, tuners, adapters or binary."
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """List the methods of every axis with their settings, as spec strings name them.

    [bold]Examples[/bold]

      plait methods

      plait methods policies --json
    """
    from plait.decode.speculate import SPECULATORS
    from plait.memory import CODECS, POLICIES
    from plait.nn.config import MIXERS
    from plait.nn.distance_bias import BIASES
    from plait.train import OBJECTIVES, TUNERS
    from plait.weights import FORMATS
    from plait.weights.adapters import ADAPTERS
    from plait.weights.binary import BINARIZERS

    axes = {
        "codecs": CODECS,
        "policies": POLICIES,
        "weights": FORMATS,
        "drafts": SPECULATORS,
        "mixers": MIXERS,
        "biases": BIASES,
        "objectives": OBJECTIVES,
        "tuners": TUNERS,
        "adapters": ADAPTERS,
        "binary": BINARIZERS,
    }
    if axis is not None and axis not in axes:
        raise UnknownNameError(f"Unknown axis {axis!r}.{suggestion(axis, axes)} Known: {', '.join(axes)}.")
    listing = [
        {
            "axis": name,
            "method": method.name,
            "summary": (inspect.getdoc(method) or "").split("\n\n")[0].replace("\n", " "),
            "settings": {
                field.name: _shown(field.default)
                for field in dataclasses.fields(method)  # type: ignore[arg-type]
            },
        }
        for name, choices in axes.items()
        if axis in (None, name)
        for method in (choices.methods[key] for key in choices.names())
    ]
    if json_output:
        print_json(listing)
        return
    heading = ""
    for row in listing:
        if row["axis"] != heading:
            heading = str(row["axis"])
            typer.echo(heading)
        typer.echo(f"  {row['method']:<18} {row['summary']}")
        settings = row["settings"]
        if isinstance(settings, dict) and settings:
            typer.echo("  " + " " * 18 + " " + ", ".join(f"{k}={v}" for k, v in settings.items()))


def _shown(default: Any) -> Any:
    """A default as JSON holds it: a method by its spec string, none at all as null."""
    if default is dataclasses.MISSING:
        return None
    return str(default) if isinstance(default, Spec) else default
