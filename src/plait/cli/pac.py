"""The `pac` commands: completions of code with holes where the model is unsure, and a promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from plait.cli.common import Json, Model, Offline, load_model, print_json, read_file, say
from plait.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(
    rich_markup_mode="rich", no_args_is_help=True, help="Complete code with holes where the model is unsure."
)


@app.command()
def calibrate(
    file: Annotated[Path, typer.Argument(help="Lines of JSON, each with prompt and truth; - for stdin.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the calibrated sets are written.")],
    model: Model = "smollm2",
    epsilon: Annotated[float, typer.Option(help="Share of inputs whose truth may be missed.")] = 0.1,
    delta: Annotated[float, typer.Option(help="Chance that more are missed.")] = 0.05,
    holes: Annotated[int, typer.Option(help="Most holes of a program.")] = 4,
    language: Annotated[str, typer.Option(help="python or sql.")] = "python",
    offline: Offline = False,
    json_output: Json = False,
) -> None:
    """Find the threshold that keeps the promise, from prompts whose true next line is known.

    Each line has a prompt, its true line as truth, and in prefix what the prompt holds of that line, if anything.

    [bold]Examples[/bold]

      yes '{"prompt": "def f(a):\\n    return", "prefix": "return", "truth": "return a"}' | head -n 14 > examples.jsonl

      plait pac calibrate examples.jsonl --output sets.json --epsilon 0.2
    """
    from plait.code import Example, PACSets, model_identity, predict_line, with_prefix

    sets = PACSets(epsilon=epsilon, delta=delta, holes=holes, language=language)
    prompts, prefixes, truths = [], [], []
    for number, line in enumerate(read_file(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
            prompts.append(str(one["prompt"]))
            prefixes.append(str(one.get("prefix", "")))
            truths.append(str(one["truth"]).encode())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"Line {number} is not JSON with prompt and truth: {error!r}.") from None
    lm = load_model(model, offline=offline)
    examples = [
        Example(with_prefix(prediction, prefix), truth)
        for prediction, prefix, truth in zip(predict_line(lm, prompts), prefixes, truths, strict=True)
    ]
    sets = sets.calibrate(examples, model=model_identity(lm))
    sets.save(output)
    if json_output:
        print_json(sets.to_json())
    else:
        say(f"threshold {sets.tau:.4g} from {sets.num_examples} examples, in {output}")


@app.command()
def complete(
    file: Annotated[Path, typer.Argument(help="A file with the prompt; - for standard input.")],
    sets: Annotated[Path, typer.Option("--sets", help="What plait pac calibrate wrote.")],
    model: Model = "smollm2",
    prefix: Annotated[str, typer.Option(help="What the prompt holds of the line that it ends in.")] = "",
    offline: Offline = False,
    json_output: Json = False,
) -> None:
    """Complete the line that a prompt ends in; prints it with ?? for each hole.

    [bold]Examples[/bold]

      plait pac complete function.txt --sets sets.json --prefix return

      plait pac complete function.txt --sets sets.json --json
    """
    from plait.code import PACSets, model_identity, predict_line, with_prefix

    prompt = read_file(file)
    calibrated = PACSets.load(sets)
    lm = load_model(model, offline=offline)
    (prediction,) = predict_line(lm, [prompt])
    found = calibrated.predict(with_prefix(prediction, prefix), model=model_identity(lm))
    if json_output:
        print_json(
            {
                "text": found.text,
                "prediction": found.prediction.source.decode("utf-8", "replace"),
                "removed": found.removed,
                "holes": len(found.holes),
                "tau": found.tau,
                "epsilon": calibrated.epsilon,
                "delta": calibrated.delta,
            }
        )
    else:
        typer.echo(found.text)
