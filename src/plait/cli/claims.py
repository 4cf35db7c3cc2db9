"""The `claims` commands: what Plait claims, beside what was measured on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.common import Json, print_json, say, telling
from plait.errors import ConfigError, DownloadError, MissingExtraError
from plait.files import write_text

if TYPE_CHECKING:
    from plait.claims import Result, Row

__all__ = ["app"]

app = typer.Typer(rich_markup_mode="rich")

Results = Annotated[
    Path | None,
    typer.Option(
        "--results", envvar="PLAIT_CLAIMS", help="Folder of results; your own data folder when left out."
    ),
]


@app.callback(invoke_without_command=True)
def ledger(context: typer.Context, results: Results = None, json_output: Json = False) -> None:
    """List what Plait claims, beside what was measured here, or measure it again.

    [bold]Examples[/bold]

      plait claims

      plait claims run exact-merge

      plait claims --json
    """
    if context.invoked_subcommand is not None:
        return
    rows = _read(results)
    if json_output:
        print_json([row.to_json() for row in rows])
    else:
        _print_table(rows)


@app.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(help="Names of claims.", metavar="NAME...")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Measure every claim.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure a small part, to see that it works; keeps nothing.")
    ] = False,
    results: Results = None,
    json_output: Json = False,
) -> None:
    """Measure claims from scratch and keep the results.

    Ctrl-C keeps the earlier result of the claim that was running. bibench goes on where an interrupted run
    stopped. The exit status is 1 when a bar is missed or a claim could not be measured.

    [bold]Examples[/bold]

      plait claims run exact-merge frames

      plait claims run --all --results docs/claims
    """
    from plait.claims import Run, Store, all_claims, find_claim, run_claim

    if bool(names) == everything:
        raise typer.BadParameter("give names of claims, or --all.")
    claims = list(all_claims().values()) if everything else [find_claim(name) for name in names or []]
    store = Store(results)
    done: list[Result] = []
    missing = 0
    for claim in claims:
        parts = None if quick else store.parts(claim)
        try:
            with telling(claim.name) as tell:
                if parts is not None and parts.exists():
                    tell(f"going on where an earlier run stopped, with {parts}")
                result = run_claim(claim, Run(quick=quick, parts=parts), tell)
        except KeyboardInterrupt:
            say(f"{claim.name} was not measured; its earlier result, if any, is unchanged")
            raise
        except (MissingExtraError, DownloadError) as error:
            say(f"error: {error}")
            missing += 1
            continue
        if not quick:
            store.write(result)
            if result.error is None:
                store.forget_parts(claim)
        done.append(result)
        if not json_output:
            _print_result(result)
    if json_output:
        print_json([result.to_json() for result in done])
    if quick:
        say("Quick runs prove nothing and are not kept. Leave --quick out to measure.")
    if missing or any(result.verdict != "holds" for result in done):
        raise typer.Exit(1)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of a claim.")],
    results: Results = None,
    json_output: Json = False,
) -> None:
    """Show one claim: what is claimed, at what scale, the bars and why, and the last measurement here.

    [bold]Examples[/bold]

      plait claims show exact-merge

      plait claims show decode-speed --json
    """
    from plait.claims import Row, Store, find_claim
    from plait.claims.ledger import bar_text

    claim = find_claim(name)
    row = Row(claim, Store(results).read(claim))
    if json_output:
        print_json(row.to_json())
        return
    typer.echo(f"{claim.name}: {claim.title}")
    typer.echo(f"\n{claim.headline}\n")
    if claim.source is not None:
        typer.echo(f"source   {claim.source}")
    typer.echo(f"scale    {claim.scale}")
    for bar in claim.bars:
        typer.echo(f"bar      {bar.quantity.replace('_', ' ')} {bar_text(bar)}. {bar.why}")
    if claim.needs:
        typer.echo(f"needs    {', '.join(claim.needs)} (pip install 'plait[test]')")
    typer.echo(f"verdict  {row.state}\n")
    if row.result is None:
        typer.echo(f"Measure it with: plait claims run {claim.name}")
    else:
        _print_result(row.result)
        typer.echo(f"  Plait {row.result.plait}, {row.result.date}, {row.result.seconds:,.1f} s")
        typer.echo(f"  {row.result.machine}")


@app.command()
def page(
    output: Annotated[Path, typer.Option("--output", help="Markdown file to write.")],
    results: Results = None,
    short: Annotated[
        bool, typer.Option("--short", help="Write the short ledger between the markers of the file.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 when the file is not up to date.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Write the ledger as a Markdown page. The same results always give the same page.

    [bold]Examples[/bold]

      plait claims page --results docs/claims --output docs/claims.md

      plait claims page --results docs/claims --output docs/claims.md --check
    """
    from plait.claims import full_page, with_short_ledger

    rows = _read(results)
    try:
        old = output.read_bytes().decode("utf-8") if output.exists() else None
        if short:
            new = with_short_ledger(old or "", rows)
        else:
            new = full_page(rows)
        if old != new and not check:
            write_text(output, new)
    except OSError as error:
        raise ConfigError(f"{output} could not be read or written: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{output} is not UTF-8 text: {error}.") from None
    if json_output:
        print_json({"file": str(output), "up_to_date": old == new, "written": old != new and not check})
    elif not check:
        typer.echo(output)
    if check and old != new:
        say(f"{output} is not up to date. Run the same command without --check.")
        raise typer.Exit(1)


def _read(results: Path | None) -> list[Row]:
    from plait.claims import Store, all_claims, read_ledger

    return read_ledger(all_claims().values(), Store(results))


def _print_result(result: Result) -> None:
    from plait.claims.ledger import bar_text, quantity_text

    quick = " (quick run)" if result.quick else ""
    typer.echo(f"{result.claim}: {result.verdict}{quick}")
    if result.error is not None:
        typer.echo(f"  {result.error}")
    bars = {judgement.bar.quantity: judgement.bar for judgement in result.judgements}
    width = max((len(name) for name in result.quantities), default=0)
    for name, quantity in result.quantities.items():
        bar = f"  bar {bar_text(bars[name])}" if name in bars else ""
        typer.echo(f"  {name.replace('_', ' '):<{width}}  {quantity_text(quantity)}{bar}")


def _print_table(rows: list[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from plait.claims.ledger import measured_text

    table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1, 1, 0))
    table.add_column("claim", no_wrap=True)
    table.add_column("headline", ratio=3)
    table.add_column("scale", ratio=4)
    table.add_column("measured here", ratio=3)
    table.add_column("verdict")
    for row in rows:
        verdict = "\n".join(filter(None, [row.state, row.day]))
        cells = [row.claim.name, row.claim.headline, row.claim.scale, measured_text(row), verdict]
        table.add_row(*(Text(cell) for cell in cells))
    # A pipe or a file has no width; wrap there as on a wide terminal.
    Console(width=None if sys.stdout.isatty() else 140).print(table)
