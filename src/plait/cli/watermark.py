"""The `watermark` commands: mark a text, and find the mark again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.common import Json, Model, Offline, load_model, print_json, read_bytes, read_file, say

if TYPE_CHECKING:
    from plait.text.words import Lexicon

__all__ = ["app"]

app = typer.Typer(rich_markup_mode="rich", no_args_is_help=True, help="Mark English text, and find the mark.")

File = Annotated[Path, typer.Argument(help="A text file in UTF-8; - for standard input.")]
KeyFile = Annotated[
    Path, typer.Option("--key-file", envvar="PLAIT_WATERMARK_KEY", help="A file of 16 secret bytes or more.")
]


@app.command()
def embed(
    file: File,
    key_file: KeyFile,
    model: Model = "smollm2",
    max_replaced: Annotated[float, typer.Option(help="Largest share of words to replace.")] = 0.25,
    target_z: Annotated[float, typer.Option(help="Strength at which to stop.")] = 6.0,
    offline: Offline = False,
    json_output: Json = False,
) -> None:
    """Replace words by synonyms so that the key finds the text again; prints the marked text.

    [bold]Examples[/bold]

      head -c 32 /dev/urandom > key

      plait watermark embed answer.txt --key-file key > marked.txt

      plait watermark embed answer.txt --key-file key --json
    """
    from plait.prose import Watermark

    text, key = read_file(file), read_bytes(key_file)
    # Settings are checked before anything is loaded.
    lexicon = _lexicon(offline)
    Watermark(key, lexicon, max_replaced=max_replaced, target_z=target_z)
    mark = Watermark(
        key, lexicon, load_model(model, offline=offline), max_replaced=max_replaced, target_z=target_z
    )
    marked = mark.embed(text)
    if json_output:
        print_json(
            {
                "text": marked.text,
                "words": marked.words,
                "replaced": [one._asdict() for one in marked.replaced],
                **marked.detection._asdict(),
            }
        )
        return
    typer.echo(marked.text, nl=False)
    say(
        f"{len(marked.replaced)} of {marked.words} words replaced; z {marked.z:.2f}, "
        f"p {marked.detection.p_value:.2g}: {marked.detection.verdict}"
    )


@app.command()
def detect(
    file: File,
    key_file: KeyFile,
    precise: Annotated[
        bool, typer.Option("--precise", help="Ask a model which words could have been replaced.")
    ] = False,
    alpha: Annotated[float, typer.Option(help="Share of unmarked texts to take for marked.")] = 0.01,
    model: Model = "smollm2",
    offline: Offline = False,
    json_output: Json = False,
) -> None:
    """Test a text for the mark of a key; prints the verdict.

    [bold]Examples[/bold]

      plait watermark detect marked.txt --key-file key

      plait watermark detect marked.txt --key-file key --precise --json
    """
    from plait.prose import Watermark

    text, key = read_file(file), read_bytes(key_file)
    lexicon = _lexicon(offline)
    Watermark(key, lexicon, alpha=alpha)
    lm = load_model(model, offline=offline) if precise else None
    found = Watermark(key, lexicon, lm, alpha=alpha).detect(text, mode="precise" if precise else "fast")
    if json_output:
        print_json(found._asdict())
    else:
        typer.echo(f"{found.verdict}: {found.ones} ones of {found.n}, z {found.z:.2f}, p {found.p_value:.2g}")


def _lexicon(offline: bool) -> Lexicon:
    from plait.hub import RichProgress
    from plait.prose import english_lexicon

    return english_lexicon(progress=RichProgress(), offline=offline or None)
