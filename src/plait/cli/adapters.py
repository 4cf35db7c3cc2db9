"""Commands about adapters: info, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plait.cli.common import Json, Offline, print_json, say

__all__ = ["app"]

app = typer.Typer(rich_markup_mode="rich", no_args_is_help=True)

Folder = Annotated[
    Path, typer.Argument(help="Folder with adapter_config.json and adapter_model.safetensors.")
]


@app.callback()
def _about() -> None:
    """Look at adapters, or write one into its model.

    Make them with plait train adapter or the peft package; answer with --adapter of plait run and plait chat.

    [bold]Examples[/bold]

      plait adapters info ./my-adapter

      plait adapters merge ./my-adapter --model smollm2 --output smollm2-mine
    """


@app.command()
def info(folder: Folder, json_output: Json = False) -> None:
    """Tell what an adapter is: its method, the model that it names, its size.

    [bold]Examples[/bold]

      plait adapters info ./my-adapter

      plait adapters info ./my-adapter --json
    """
    from plait.nn import inspect_adapter

    facts = inspect_adapter(folder)._asdict()
    if json_output:
        print_json(facts)
        return
    for name, value in facts.items():
        typer.echo(f"{name:<12} {f'{value:,}' if isinstance(value, int) else value or '-'}")


@app.command()
def merge(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new model.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="The model that the adapter is for.")
    ] = "smollm2",
    offline: Offline = False,
    json_output: Json = False,
) -> None:
    """Write a model into which an adapter is merged, in fp32; plait quantize makes it small again.

    [bold]Examples[/bold]

      plait adapters merge ./my-adapter --model smollm2 --output smollm2-mine

      plait quantize smollm2-mine --format bitmod:bits=4 --output smollm2-mine-4bit
    """
    from plait.engine import merge_adapter

    made = merge_adapter(
        Path(model) if Path(model).exists() else model, folder, output, offline=offline or None
    )
    if json_output:
        print_json({"path": str(made)})
    else:
        say(f'Try it: plait run --model {made} "..."')
        typer.echo(str(made))
