"""The `serve` command: its options are the settings of the server, so that no name is written twice."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.common import load_model, print_json, say

__all__ = ["serve"]

_PANELS = {
    "Model": ("model", "weights", "memory", "draft", "draft_model", "offline", "watermark"),
    "Address": ("host", "port", "replicas"),
    "Access": ("api_keys", "share_across_keys", "allowed_origins"),
    "Engine": ("memory_bytes", "rows_per_step", "max_sequences"),
    "Page and log": ("playground", "trace", "log_format", "log_prompts"),
}


def serve(config: Path | None = None, show_settings: bool = False, **flags: Any) -> None:
    """Serve a model over HTTP: OpenAI's interface, sessions, and a playground page.

    Every option is also an environment variable and a key of the TOML file; options win over variables, which
    win over the file.

    [bold]Examples[/bold]

      plait serve

      plait serve --model smollm2 --draft token-recycling --port 8080
    """
    from plait.serve import read_settings, run

    settings = read_settings(flags, os.environ, config)
    if show_settings:
        print_json(settings.model_dump(mode="json", exclude={"api_keys"}))
        return
    if settings.replicas > 1:
        from plait.serve.front import run_front

        run_front(settings, say)
        return
    run(lambda: load_served(settings), settings, say)


def load_served(settings: Any) -> Any:
    """The model that settings of a server name."""
    return load_model(
        settings.model,
        weights=settings.weights,
        memory=settings.memory,
        draft=settings.draft,
        draft_model=settings.draft_model,
        offline=settings.offline,
    )


def _options() -> list[inspect.Parameter]:
    """One option for each setting, in the order of the settings."""
    from plait.serve.settings import Settings, environment_name

    panels = {name: panel for panel, names in _PANELS.items() for name in names}
    keyword = inspect.Parameter.KEYWORD_ONLY
    config = typer.Option("--config", envvar="PLAIT_SERVE_CONFIG", help="TOML file with settings.")
    show = typer.Option("--show-settings", help="Print the settings as JSON, without keys, and end.")
    options = [
        inspect.Parameter("config", keyword, default=None, annotation=Annotated[Path | None, config]),
        inspect.Parameter("show_settings", keyword, default=False, annotation=Annotated[bool, show]),
    ]
    for name, field in Settings.model_fields.items():
        shown = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        default = (
            ""
            if shown in (None, "")
            else f" Default: {str(shown).lower() if isinstance(shown, bool) else shown}."
        )
        flag = f"--{name.replace('_', '-')}"
        kind: Any = {bool: bool, int: int, float: float}.get(type(field.default), str)
        if name == "max_prompt_tokens":
            kind = int
        option = typer.Option(
            f"{flag}/--no-{name.replace('_', '-')}" if kind is bool else flag,
            envvar=environment_name(name),
            help=f"{field.description}{default}",
            show_default=False,
            rich_help_panel=panels.get(name, "Limits"),
        )
        options.append(
            inspect.Parameter(name, keyword, default=None, annotation=Annotated[kind | None, option])
        )
    return options


# Typer reads these in place of what is written above.
serve.__signature__ = inspect.Signature(_options())  # type: ignore[attr-defined]
serve.__annotations__ = {}
