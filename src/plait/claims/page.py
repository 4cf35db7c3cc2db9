"""The ledger as Markdown: a page with everything, and a short table for the README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from plait.claims.ledger import Row, bar_text, measured_text, quantity_text
from plait.errors import ConfigError

__all__ = ["BEGIN", "END", "full_page", "short_ledger", "with_short_ledger"]

# The short ledger stands between these two lines of a Markdown file.
BEGIN = "<!-- claims: begin -->"
END = "<!-- claims: end -->"


def full_page(rows: Sequence[Row]) -> str:
    """The ledger page; the same rows give the same text."""
    parts = [
        "# Claims\n\n"
        "Every sentence that Plait claims, beside what was measured. This page is written by\n"
        "`plait claims page` from result files; no number on it is typed by hand. Measure any of them\n"
        "on your own machine with `plait claims run NAME`.\n",
        _table(
            ["claim", "headline", "scale", "measured", "verdict", "date"],
            (
                [
                    f"[{row.claim.name}](#{row.claim.name})",
                    row.claim.headline,
                    row.claim.scale,
                    measured_text(row),
                    f"**{row.state}**",
                    row.day,
                ]
                for row in rows
            ),
        ),
        *(_section(row) for row in rows),
    ]
    return "\n".join(parts)


def short_ledger(rows: Sequence[Row]) -> str:
    """A table of claims, measurements and verdicts, and the machines they were measured on."""
    table = _table(
        ["claim", "measured", "verdict"],
        ([row.claim.headline, measured_text(row), f"**{row.state}**"] for row in rows),
    )
    machines = sorted({str(row.result.machine) for row in rows if row.result is not None})
    return table + "".join(f"\nMeasured on: {machine}.\n" for machine in machines)


def with_short_ledger(text: str, rows: Sequence[Row]) -> str:
    """A Markdown text with the short ledger between its markers; everything else is unchanged.

    Raises:
        ConfigError: the markers are not there once each, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ConfigError(
            f"The short ledger needs the lines {BEGIN!r} and {END!r}, once each and in this order."
        )
    return f"{before}{BEGIN}\n\n{short_ledger(rows)}\n{END}{after}"


def _section(row: Row) -> str:
    claim, result = row.claim, row.result
    lines = [f"## {claim.name}", "", f"{claim.title}. {claim.headline}", ""]
    if claim.source is not None:
        lines += [f"Source: {claim.source}", ""]
    lines += [f"Scale: {claim.scale}", ""]
    for bar in claim.bars:
        lines.append(f"- Bar: {bar.quantity.replace('_', ' ')} {bar_text(bar)}. {bar.why}")
    lines += ["", f"Verdict: **{row.state}**", ""]
    if result is not None and result.error is not None:
        lines += [f"The run failed. {result.error}", ""]
    if result is not None and result.quantities:
        pairs = ([name.replace("_", " "), quantity_text(value)] for name, value in result.quantities.items())
        lines.append(_table(["measured", "value"], pairs))
    if result is not None:
        lines += [
            f"Plait {result.plait}, {result.date}, {result.seconds:,.1f} s, on {result.machine}.",
            "",
        ]
    return "\n".join([*lines, f"```console\n$ plait claims run {claim.name}\n```", ""])


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_line(heading), _line(["---"] * len(heading)), *(_line(row) for row in rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"
