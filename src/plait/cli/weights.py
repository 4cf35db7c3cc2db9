"""The `quantize` command: a model in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plait.cli.common import Json, Offline, print_json, say
from plait.errors import ConfigError

__all__ = ["quantize"]


def quantize(
    model: Annotated[str, typer.Argument(help="Alias, folder, .gguf file or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.")],
    format: Annotated[
        str, typer.Option("--format", "-f", help="Format of the blocks: bitmod:bits=3, gptq:bits=4, ...")
    ] = "bitmod:bits=4",
    head: Annotated[
        str | None,
        typer.Option(
            "--head", help="Format of embedding and head; left out, codes stay as they are, or q8_0."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            "-c",
            help="Text like that which the model will read, for formats that look at inputs.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Pieces of the text to read.")] = 16,
    sample_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each piece.")] = 512,
    offline: Offline = False,
    json_output: Json = False,
) -> None:
    """Store a model in fewer bits, block by block. Stopped or killed, the same command goes on.

    [bold]Examples[/bold]

      plait quantize smollm2 --format bitmod:bits=3,group=192 --output smollm2-3bit

      plait quantize smollm2 --format decoupleq:bits=2 --calibration book.txt --output smollm2-2bit
    """
    from plait.engine import quantize as run
    from plait.hub import RichProgress

    text = ""
    if calibration is not None:
        try:
            text = calibration.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{calibration} could not be read: {error}. Give a file of UTF-8 text."
            ) from None
    made = run(
        Path(model) if Path(model).exists() else model,
        format,
        output,
        head=head,
        calibration=text,
        samples=samples,
        sample_tokens=sample_tokens,
        offline=offline or None,
        download=RichProgress(),
        progress=say,
    )
    facts = {
        "path": str(made.path),
        "bytes": made.nbytes,
        "weights": made.weights,
        "bits_per_weight": made.bits_per_weight,
        "reused_parts": made.reused,
    }
    if json_output:
        print_json(facts)
    else:
        typer.echo(
            f"{output}: {made.nbytes / 1e6:.1f} MB, {made.bits_per_weight:.3f} bits for each of "
            f"{made.weights / 1e6:.1f} million weights of the blocks"
        )
