"""The next byte of a text."""

from __future__ import annotations

from typing import Annotated

import typer

from plait.cli.common import Json, Memory, Offline, Weights, load_model, print_json, read_text
from plait.errors import ConfigError

__all__ = ["next_bytes"]


def next_bytes(
    prompt: Annotated[list[str] | None, typer.Argument(help="The text so far; - is standard input.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="As for run; several are mixed, whatever their vocabularies."),
    ] = None,
    top: Annotated[int, typer.Option("--top", "-k", min=1, max=257, help="How many outcomes to list.")] = 10,
    count: Annotated[
        int, typer.Option("--generate", "-n", min=0, help="Continue by that many bytes, greedily.")
    ] = 0,
    weights: Weights = "auto",
    memory: Memory = "full",
    offline: Offline = False,
    json_output: Json = False,
) -> None:
    """Show how likely each next byte of a text is, wherever the text was cut.

    [bold]Examples[/bold]

      plait bytes "import nump"

      plait bytes "The capital of France is Pari" -m smollm2 -m gemma3-270m --json
    """
    import numpy as np

    from plait.engine import ensemble

    text = read_text(prompt or [], wait=True)
    names = model or ["smollm2"]
    if len(set(names)) < len(names):
        raise ConfigError(f"--model names a model twice: {', '.join(names)}.")
    models = [load_model(name, weights=weights, memory=memory, offline=offline) for name in names]
    source = models[0].bytes() if len(models) == 1 else ensemble(models)
    law = source.next(text)
    order = np.argsort(-law, kind="stable")[:top].tolist()
    written = source.generate(text, max_bytes=count).text if count else ""
    if json_output:
        outcomes = [{"byte": byte if byte < 256 else None, "probability": float(law[byte])} for byte in order]
        print_json({"models": names, "next": outcomes, **({"text": written} if count else {})})
        return
    for byte in order:
        typer.echo(f"{law[byte]:.6f}  {_name(byte)}")
    if count:
        typer.echo(f"\n{text}{written}")


def _name(byte: int) -> str:
    if byte == 256:
        return "end of text"
    return f"{byte:#04x}  {chr(byte)!r}" if byte < 0x80 else f"{byte:#04x}"
