"""The `bench` commands: what a choice brings on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plait.cli.common import Json, Memory, Model, Offline, Weights, load_model, print_json, say
from plait.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(
    rich_markup_mode="rich", no_args_is_help=True, help="Measure what a choice brings on this machine."
)


@app.callback()
def bench() -> None:
    """Measure what a choice brings on this machine.

    [bold]Examples[/bold]

      plait bench decode --draft prompt-lookup

      plait bench bibench --quick
    """


@app.command()
def decode(
    model: Model = "smollm2",
    weights: Weights = "auto",
    memory: Memory = "full",
    drafts: Annotated[
        list[str] | None, typer.Option("--draft", help="A draft; give the option again for another.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", help="chat, completion, editing, copying or mathematics; all when left out."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each task, at most.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Times that everything is answered.")] = 1,
    offline: Offline = False,
    json_output: Json = False,
) -> None:
    """Compare drafts with plain decoding, task by task: tokens for each pass, and time.

    Answers are greedy, of full length, and given in turns. Exit status 1 where a draft changed one.

    [bold]Examples[/bold]

      plait bench decode --draft prompt-lookup --draft token-recycling

      plait bench decode --draft mix:prompt-lookup+token-recycling --task editing --json
    """
    from plait.claims.decoding import measure_decoding
    from plait.claims.measure import follow

    chosen = drafts or ["prompt-lookup", "token-recycling", "mix:prompt-lookup+token-recycling"]
    lm = load_model(model, weights=weights, memory=memory, offline=offline)
    if lm.chat_template is None:
        raise ConfigError(f"{model} has no chat template, which the tasks need.")
    from plait.claims.tasks import TASKS

    steps = measure_decoding(
        lm, chosen, tasks or list(TASKS), prompts=prompts, max_new_tokens=max_new_tokens, rounds=rounds
    )
    found = follow(steps, say)
    if json_output:
        print_json(found.to_json())
    else:
        width = max(map(len, chosen))
        typer.echo(f"{'task':12} {'draft':{width}}  tokens/pass  rows/pass  speed  right by depth")
        for row in found.rows:
            accepted = " ".join(f"{share:.2f}" for share in row.accepted[:8]) or "nothing guessed"
            typer.echo(
                f"{row.task:12} {row.draft:{width}}  {row.tokens_per_pass:11.2f}  {row.rows:9.1f}  "
                f"{row.ratio:4.2f}x  {accepted}"
            )
        if found.curve:
            one = found.curve[1]
            shown = "  ".join(f"{rows}: {seconds / one:.2f}" for rows, seconds in found.curve.items())
            typer.echo(f"time of a pass by its rows, against one row of {1000 * one:.1f} ms: {shown}")
    if changed := [row for row in found.rows if row.identical < 1]:
        say(f"error: {changed[0].draft} changed an answer of {changed[0].task}")
        raise typer.Exit(1)


@app.command()
def bibench(
    tracks: Annotated[
        list[str] | None,
        typer.Option(
            "--track",
            help="task, architecture, robustness, training, complexity or hardware; several, all when left out.",
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method", "-m", help="A method of one bit, as a spec string; several, all when left out."
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick/--full", help="A quarter of an hour with one seed, or a night with three."),
    ] = True,
    work: Annotated[
        Path | None,
        typer.Option("--work", help="Folder to keep trained cells in; a stopped run goes on there."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the radar into this .svg, .png or .pdf.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Compare methods that train networks whose weights and inputs have one bit, by the six tracks of BiBench.

    Each overall metric is relative to the same networks in full precision; more is better.

    [bold]Examples[/bold]

      plait bench bibench --quick --plot radar.svg

      plait bench bibench --track task --track training -m react -m xnor --json

      plait bench bibench --full --work bibench-cells
    """
    from plait.claims.bibench.cells import FULL, QUICK, Grid
    from plait.claims.bibench.report import check_radar, draw_radar, measure
    from plait.claims.measure import follow

    if plot is not None:
        check_radar(plot)
    grid = Grid(QUICK if quick else FULL, methods or (), work)
    report = follow(measure(grid, [] if tracks == ["all"] else tracks or []), say)
    if plot is not None:
        draw_radar(report, plot)
    if json_output:
        print_json(report.to_json())
        return
    for line in report.lines():
        typer.echo(line)
