"""Commands about models: pull, models, info."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from plait.cli.common import Json, Offline, print_json, say

__all__ = ["info", "models", "pull"]


def pull(name: Annotated[str, typer.Argument(help="Alias or hub id.")], offline: Offline = False) -> None:
    """Bring a model to this machine, or check that it is here. Running it again resumes.

    [bold]Examples[/bold]

      plait pull smollm2

      plait pull gemma3-270m
    """
    from plait.hub import RichProgress, resolve

    path = resolve(name, progress=RichProgress(), offline=offline or None)
    typer.echo(path)


def models(json_output: Json = False) -> None:
    """List the models that have a short name, and those that are on this machine.

    [bold]Examples[/bold]

      plait models

      plait models --json
    """
    from plait.hub import ALIASES, cached_models

    cached = {model.name: model for model in cached_models()}
    rows = [
        {
            "name": name,
            "here": name in cached,
            "bytes": cached[name].nbytes if name in cached else ALIASES[name].nbytes,
            "description": ALIASES[name].description if name in ALIASES else cached[name].source,
        }
        for name in [*ALIASES, *(name for name in cached if name not in ALIASES)]
    ]
    if json_output:
        print_json(rows)
        return
    width = max(len(str(row["name"])) for row in rows)
    for row in rows:
        here = "here" if row["here"] else "    "
        typer.echo(
            f"{row['name']:<{width}}  {here}  {int(str(row['bytes'])) / 1e6:7.0f} MB  {row['description']}"
        )


def info(
    model: Annotated[str, typer.Argument(help="Alias, folder, .gguf file or hub id.")],
    offline: Offline = False,
    json_output: Json = False,
) -> None:
    """Describe a model: parameters, architecture, context, bytes by storage format.

    [bold]Examples[/bold]

      plait info smollm2

      plait info ./model.gguf --json
    """
    from plait.engine.loading import read_text_side
    from plait.hub import RichProgress, resolve
    from plait.nn import describe
    from plait.nn.checkpoints import open_checkpoint

    path = resolve(
        str(Path(model)) if Path(model).exists() else model, progress=RichProgress(), offline=offline or None
    )
    with open_checkpoint(path) as checkpoint:
        config = describe(checkpoint).config
        tokenizer, template = read_text_side(checkpoint)
        tensors = checkpoint.tensors().values()
        numbers = 0
        by_format: Counter[str] = Counter()
        for tensor in tensors:
            count = 1
            for size in tensor.shape:
                count *= size
            numbers += count
            by_format[tensor.format] += tensor.nbytes
    facts = {
        "path": str(path),
        "family": config.family,
        "parameters": numbers,
        "layers": len(config.blocks),
        "width": config.width,
        "mixer": config.blocks[0].mixer.to_json(),
        "feed_forward": config.blocks[0].feed_forward.to_json(),
        "context": config.max_positions,
        "vocabulary": config.vocab_size,
        "tied_head": config.tied_head,
        "tokenizer": tokenizer.name,
        "chat_template": template is not None,
        "bytes": dict(by_format.most_common()),
    }
    if json_output:
        print_json(facts)
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{k} {_amount(name, v)}" for k, v in value.items() if v not in (None, False))
        else:
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        typer.echo(f"{name.replace('_', ' '):<14} {shown}")
    if template is None:
        say("This model has no chat template: use plait run --plain.")


def _amount(name: str, value: object) -> str:
    return f"{int(str(value)) / 1e6:.1f} MB" if name == "bytes" else str(value)
