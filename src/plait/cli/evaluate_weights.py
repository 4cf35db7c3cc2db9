"""The command `eval weights`: what weight formats of a model cost."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.common import Json, Offline, print_json, read_file, say

if TYPE_CHECKING:
    from plait.evaluation.weights import WeightRow

__all__ = ["draw", "facts", "weights"]

_DEFAULTS = [
    "file",
    "bitmod:bits=4,group=192",
    "bitmod:bits=3,group=192",
    "nf4:group=192",
    "uniform:bits=4,group=192",
]

# Nats below which a form is drawn as the model itself: activations in 15 bits cause about a tenth of it.
_SAME = 1e-5


def weights(
    model: Annotated[str, typer.Argument(help="Alias, folder, .gguf file or hub id.")],
    format: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            "-f",
            help="A weight format, `file`, or the path of another file of the model; several.",
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", "-t", help="Text to read; Python's manual when left out.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", "-c", help="Other text, for formats that look at inputs."),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Pieces of the text to read.")] = 5,
    window_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 512,
    samples: Annotated[int, typer.Option(min=1, help="Pieces of 512 tokens of the calibration text.")] = 16,
    sizes: Annotated[int, typer.Option(min=2, help="Sizes of a bitstack, smallest to whole.")] = 8,
    speed_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens to decode for the speed; 0 to leave it out.")
    ] = 0,
    work: Annotated[
        Path | None,
        typer.Option("--work", help="Folder to keep packed models in; made and removed when left out."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw quality against bytes into this .svg, .png or .pdf.")
    ] = None,
    offline: Offline = False,
    json_output: Json = False,
) -> None:
    """Compare weight formats of a model: loss, divergence from its own weights, agreement, bytes, speed.

    Rows that no other beats in bytes and divergence are marked. A row each, as it is measured.

    [bold]Examples[/bold]

      plait eval weights smollm2

      plait eval weights smollm2 -f bitmod:bits=3,group=192 -f bitstack --calibration book.txt --plot weights.svg

      plait eval weights smollm2 -f file -f ./smollm2.Q2_K.gguf --speed-tokens 64 --json
    """
    from plait.evaluation.picture import check_picture
    from plait.evaluation.weights import compare_weights, pareto

    if plot is not None:
        check_picture(plot)
    given = calibration and read_file(calibration)
    rows: list[WeightRow] = []
    folder = tempfile.TemporaryDirectory() if work is None else nullcontext(str(work))
    with folder as made:
        for row in compare_weights(
            Path(model) if Path(model).exists() else model,
            format or _DEFAULTS,
            folder=Path(made),
            text=_manual() if text is None else read_file(text),
            calibration=given or "",
            windows=windows,
            window_tokens=window_tokens,
            samples=samples,
            sizes=sizes,
            speed_tokens=speed_tokens,
            offline=offline or None,
        ):
            rows.append(row)
            if not json_output:
                say(_line(row))
    best = pareto(rows)
    if plot is not None:
        draw(rows, plot)
    if json_output:
        print_json([facts(row) | {"on_front": row in best} for row in rows])
        return
    for row in rows:
        typer.echo(("* " if row in best else "  ") + _line(row))


def facts(row: WeightRow) -> dict[str, object]:
    """A row as JSON has it."""
    return {
        "name": row.name,
        "nats": row.quality.nats,
        "perplexity": row.quality.perplexity,
        "divergence": row.quality.divergence,
        "agreement": row.quality.agreement,
        "tokens": row.quality.tokens,
        "bits_per_weight": row.bits_per_weight,
        "file_bytes": row.file_bytes,
        "held_bytes": row.held_bytes,
        "tokens_per_second": row.tokens_per_second,
    }


def _line(row: WeightRow) -> str:
    speed = "" if row.tokens_per_second is None else f"  {row.tokens_per_second:6.1f} tokens/s"
    return (
        f"{row.name:<36} {row.bits_per_weight:6.3f} bits  {row.held_bytes / 1e6:7.1f} MB  "
        f"{row.quality.nats:6.3f} nats  divergence {row.quality.divergence:.4f}  "
        f"agrees {row.quality.agreement:.3f}{speed}"
    )


def _manual() -> str:
    from plait.claims.texts import manual

    return manual()


def draw(rows: Sequence[WeightRow], path: Path) -> None:
    """Divergence against megabytes in memory; sizes of one stack are joined by a line.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: a file that no picture can be written to.
    """
    from plait.evaluation.picture import check_picture, save_picture

    check_picture(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    stacks: dict[str, list[WeightRow]] = {}
    for row in rows:
        stacks.setdefault(row.name.partition(" at ")[0], []).append(row)
    for name, of_name in stacks.items():
        at = [row.held_bytes / 1e6 for row in of_name]
        if all(row.quality.divergence < _SAME for row in of_name):
            axes.axvline(at[0], linestyle=":", color="grey", label=f"{Path(name).name}, the same laws")
            continue
        axes.plot(
            at, [max(_SAME, row.quality.divergence) for row in of_name], marker="o", label=Path(name).name
        )
        if len(of_name) == 1 and math.isfinite(at[0]):
            axes.annotate(
                Path(name).name, (at[0], max(_SAME, of_name[0].quality.divergence)), fontsize=7,
                xytext=(4, 4), textcoords="offset points",
            )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("weights in memory, MB")
    axes.set_ylabel("divergence from the model's own weights, nats")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    save_picture(figure, path)
