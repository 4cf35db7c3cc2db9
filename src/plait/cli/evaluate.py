"""The `eval` commands: what choices cost on real text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli import evaluate_weights
from plait.cli.common import Json, Model, Offline, Weights, load_model, print_json, say, telling

if TYPE_CHECKING:
    from plait.evaluation import Report

__all__ = ["app"]

app = typer.Typer(
    rich_markup_mode="rich", no_args_is_help=True, help="Measure what choices cost on real text."
)

app.command("weights")(evaluate_weights.weights)


@app.command("long")
def long_texts(
    memories: Annotated[
        list[str] | None,
        typer.Argument(help="Memories to compare; full alone when left out.", metavar="MEMORY..."),
    ] = None,
    model: Model = "smollm2",
    weights: Weights = "auto",
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="passkey, needle, documents, completion or position; all when left out. Can be repeated."
        ),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of a case; 1000, 2000 and 4000 when left out. Can be repeated."),
    ] = None,
    count: Annotated[int, typer.Option(help="Cases of each task and length.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the cases.")] = 0,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Your own texts and .py files instead of Python's manual and library. Can be repeated."
        ),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="JSON file to keep results in; run again to go on after a stop.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Picture to draw: .svg, .png or .pdf.")] = None,
    offline: Offline = False,
    json_output: Json = False,
) -> None:
    """Find things in long texts, answer from many documents, complete code and predict a text under several memories.

    [bold]Examples[/bold]

      plait eval long full infllm:local=512 lm-infinite:local=1024

      plait eval long full gear:bits=4 --task needle --length 2000 --count 10 --results long.json --picture long.svg
    """
    from plait.errors import ConfigError
    from plait.evaluation import Material, Report, evaluate, find_tasks
    from plait.evaluation.picture import check_picture, draw

    tasks = find_tasks(task or [])
    if picture is not None:
        check_picture(picture)
    chosen = list(dict.fromkeys(memories or ["full"]))
    settings = {"model": model, "weights": weights, "seed": seed, "texts": [str(path) for path in text or []]}
    report = Report.open(results, settings)
    lm = load_model(model, weights=weights, offline=offline)
    material = Material.of_files(lm.tokenizer, text) if text else Material(lm.tokenizer)
    steps = evaluate(
        lm,
        chosen,
        tasks,
        lengths=length or [1000, 2000, 4000],
        count=count,
        seed=seed,
        material=material,
        report=report,
    )
    with telling("eval long") as tell:
        for line, _ in steps:
            tell(line)
            if results is not None:
                try:
                    report.save(results)
                except OSError as error:
                    raise ConfigError(f"{results} could not be written: {error.strerror}.") from None
    if picture is not None:
        draw(report, picture)
        say(f"drawn in {picture}")
    if json_output:
        print_json(report.to_json())
    else:
        _print(report)


def _print(report: Report) -> None:
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("task", "tokens", "memory"):
        table.add_column(name)
    for name in ("hit", "nats/token", "MB", "s/case"):
        table.add_column(name, justify="right")
    for row in report.summary():
        first = (row["task"], f"{row['length']:,}", row["memory"])
        if "refused" in row:
            table.add_row(*first, "refused", "", "", "")
            say(f"{row['memory']} refused {row['task']} at {row['length']} tokens: {row['refused']}")
            continue
        hit = "" if row["hit"] is None else f"{row['hit']:.2f}"
        table.add_row(
            *first, hit, f"{row['nats']:.3f}", f"{row['nbytes'] / 1e6:.1f}", f"{row['seconds']:.1f}"
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
