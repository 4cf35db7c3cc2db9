"""Commands that train: lm, reference, lud, draft, adapter, weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.common import Json, print_json, say
from plait.errors import ConfigError

if TYPE_CHECKING:
    from plait.train import Corpus, Recipe, Trainer

__all__ = ["app"]

app = typer.Typer(rich_markup_mode="rich", no_args_is_help=True)

Texts = Annotated[
    list[Path] | None, typer.Argument(help="UTF-8 text files; the last is held out where there are several.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the model and of the run.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the run in the folder was left.")]
TrainingSpec = Annotated[
    str,
    typer.Option(
        "--training", "-t", help="Settings of the run as key=value,...: steps, rows, learning_rate, seed, ..."
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        "--memory", help="What the model learns to read through, as for plait run: prflash:block=16, ..."
    ),
]
Start = Annotated[str, typer.Option("--model", "-m", help="The model to start from.")]


@app.callback()
def _about() -> None:
    """Train a model, from nothing or from another one.

    A run that was killed goes on with --resume and comes to the same bits. Ctrl-C saves first.

    [bold]Examples[/bold]

      plait train lm notes.txt more.txt --out my-model

      plait train lm --out my-model --resume
    """


@app.command()
def lm(
    out: Out,
    texts: Texts = None,
    shape: Annotated[
        str, typer.Option("--shape", help="Size of the model: width, blocks, heads, vocab_size, ...")
    ] = "",
    memory: Memory = "full",
    training: TrainingSpec = "",
    resume: Resume = False,
    json_output: Json = False,
) -> None:
    """Make a language model of your own texts, vocabulary included.

    [bold]Examples[/bold]

      plait train lm notes.txt more.txt --out my-model

      plait train lm notes.txt --out my-model --shape width=256,blocks=4,heads=4 --training steps=200
    """
    from plait.train import changed, language_model, train_new

    def start() -> Trainer:
        recipe = _changed(language_model(), training, memory)
        assert recipe.shape is not None
        return train_new(
            dataclasses.replace(recipe, shape=changed(recipe.shape, shape)), _read(texts or []), out
        )

    given = bool(texts or shape or training or memory != "full")
    _run(out, start, resume=resume, given=given, json_output=json_output)


@app.command()
def reference(
    out: Out, training: TrainingSpec = "", resume: Resume = False, json_output: Json = False
) -> None:
    """Make the clean full-precision model on which weight formats are measured.

    11 million parameters, on Python's standard library and manual; about 20 minutes of one core.

    [bold]Examples[/bold]

      plait train reference --out reference

      plait train reference --out reference --resume
    """
    from plait.train import python_corpus, train_new
    from plait.train import reference as recipe

    def start() -> Trainer:
        return train_new(_changed(recipe(), training), python_corpus(), out)

    _run(out, start, resume=resume, given=bool(training), json_output=json_output)


@app.command()
def lud(
    out: Out,
    model: Start = "smollm2",
    texts: Texts = None,
    objective: Annotated[
        str, typer.Option("--objective", help="Settings of lud as key=value,...: alpha, pads, mix, share.")
    ] = "",
    placeholder: Annotated[
        str,
        typer.Option(
            "--placeholder", help="Token to use as placeholder, if the model has none: one it can spare."
        ),
    ] = "<empty_output>",
    prompts: Annotated[
        int, typer.Option("--prompts", min=2, help="Answers that the model writes, where no texts are given.")
    ] = 128,
    training: TrainingSpec = "",
    resume: Resume = False,
    json_output: Json = False,
) -> None:
    """Tune a model for lexical unit decoding (--draft lud).

    Without texts it is tuned on answers of its own to passages of Python's library and manual.

    [bold]Examples[/bold]

      plait train lud --model smollm2 --out smollm2-lud

      plait train lud --model ./reference notes.txt --out reference-lud --objective alpha=0.8,pads=4
    """
    from plait.engine import load
    from plait.train import (
        changed,
        encoded,
        lexical_units,
        open_start,
        own_text,
        prompts_from,
        python_corpus,
        tune,
    )

    def start() -> Trainer:
        recipe = _changed(lexical_units(), training)
        recipe = dataclasses.replace(recipe, objective=changed(recipe.objective, objective))
        base, tokenizer, template = open_start(model, placeholder=placeholder)
        if texts:
            corpus = _read(texts)
            held_out = encoded(corpus.held_out, tokenizer) if corpus.held_out else None
            return tune(
                recipe, model, base, tokenizer, encoded(corpus.learned, tokenizer), held_out, out,
                corpus=corpus.description, template=template,
            )  # fmt: skip
        writer = load(model)
        corpus = python_corpus()
        data = own_text(writer, prompts_from(writer, corpus.learned, prompts), 96)
        held_out = own_text(writer, prompts_from(writer, corpus.held_out, max(2, prompts // 8)), 96)
        return tune(
            recipe,
            model,
            base,
            tokenizer,
            data,
            held_out,
            out,
            corpus=f"its own answers, {corpus.description}",
            template=template,
        )

    given = bool(texts or objective or training)
    _run(out, start, resume=resume, given=given, json_output=json_output)


@app.command()
def adapter(
    out: Out,
    texts: Texts = None,
    model: Start = "smollm2",
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="What is trained: lora:rank=8, dora, vera, adalora, ia3, bitfit, serial, parallel.",
        ),
    ] = "lora",
    weights: Annotated[
        str, typer.Option("--weights", help="How the model is kept meanwhile; packed matrices stay packed.")
    ] = "auto",
    original: Annotated[
        str,
        typer.Option("--original", help="Model that it was packed from; needed by lora:start=loftq."),
    ] = "",
    memory: Memory = "full",
    training: TrainingSpec = "",
    resume: Resume = False,
    json_output: Json = False,
) -> None:
    """Train an adapter for a model on your own texts; the model stays as it is, in few bits too.

    [bold]Examples[/bold]

      plait train adapter notes.txt more.txt --out my-adapter

      plait train adapter notes.txt --out my-adapter --method dora:rank=4 --weights bitmod:bits=4
    """
    from plait.train import adapter as recipe
    from plait.train import encoded, tune_adapter
    from plait.weights.adapters import ADAPTERS

    def start() -> Trainer:
        chosen = ADAPTERS.parse(method)
        corpus = _read(texts or [])
        return tune_adapter(
            chosen, model,
            lambda tokenizer: (
                encoded(corpus.learned, tokenizer),
                encoded(corpus.held_out, tokenizer) if corpus.held_out else None,
            ),
            out, weights=weights, original=original, recipe=_changed(recipe(), training, memory), corpus=corpus.description,
        )  # fmt: skip

    given = bool(texts or training or original or method != "lora" or weights != "auto" or memory != "full")
    _run(out, start, resume=resume, given=given, json_output=json_output)


@app.command()
def weights(
    out: Out,
    texts: Texts = None,
    packed: Annotated[Path | None, typer.Option("--packed", help="Folder from plait quantize.")] = None,
    teacher: Annotated[
        str, typer.Option("--teacher", help="The model that it was packed from, read in full precision.")
    ] = "smollm2",
    method: Annotated[
        str,
        typer.Option(
            "--method", help="How codes are chosen anew: values, pv:fraction=0.01, straight-through."
        ),
    ] = "pv",
    objective: Annotated[
        str, typer.Option("--objective", help="What is learned: dad:gamma=0.5, distillation, next-token.")
    ] = "dad",
    samples: Annotated[
        int, typer.Option("--samples", min=2, help="Texts that the teacher writes, where none are given.")
    ] = 128,
    training: TrainingSpec = "",
    resume: Resume = False,
    json_output: Json = False,
) -> None:
    """Tune a model of few bits towards the model that it was packed from; its bytes stay as many.

    Without texts it is tuned on what the teacher writes by itself.

    [bold]Examples[/bold]

      plait train weights --packed smollm2-2bit --teacher smollm2 --out smollm2-2bit-tuned

      plait train weights notes.txt more.txt --packed smollm2-2bit --method pv:fraction=0.02 --out tuned --training steps=100
    """
    from plait.engine import load
    from plait.text import Tokenizer
    from plait.train import OBJECTIVES, TUNERS, TokenData, encoded, sampled_text, tune_weights
    from plait.train import packed as recipe

    def start() -> Trainer:
        if packed is None:
            raise typer.BadParameter("give --packed FOLDER, or --resume.")
        chosen = dataclasses.replace(_changed(recipe(), training), objective=OBJECTIVES.parse(objective))
        corpus = _read(texts) if texts else None

        def data(tokenizer: Tokenizer) -> tuple[TokenData, TokenData | None]:
            if corpus is not None:
                held_out = encoded(corpus.held_out, tokenizer) if corpus.held_out else None
                return encoded(corpus.learned, tokenizer), held_out
            writer = load(teacher)
            return sampled_text(writer, samples, 256), sampled_text(
                writer, max(2, samples // 16), 256, seed=1
            )

        return tune_weights(
            TUNERS.parse(method), packed, teacher, data, out, recipe=chosen,
            corpus=corpus.description if corpus else "the teacher's own text",
        )  # fmt: skip

    given = bool(texts or training or packed or method != "pv" or objective != "dad")
    _run(out, start, resume=resume, given=given, json_output=json_output)


@app.command()
def draft(
    out: Out,
    model: Start = "smollm2",
    blocks: Annotated[int, typer.Option("--blocks", min=1, help="Blocks of the model to keep.")] = 6,
    prompts: Annotated[int, typer.Option("--prompts", min=2, help="Answers that the model writes.")] = 128,
    training: TrainingSpec = "",
    resume: Resume = False,
    json_output: Json = False,
) -> None:
    """Make a draft model for a model: some of its blocks, taught by the model on its own answers.

    [bold]Examples[/bold]

      plait train draft --model smollm2 --out smollm2-draft

      plait train draft --model smollm2 --blocks 4 --out small-draft --training steps=100
    """
    from plait.engine import load
    from plait.train import draft as draft_recipe
    from plait.train import open_start, own_text, prompts_from, python_corpus, tune

    def start() -> Trainer:
        recipe = dataclasses.replace(_changed(draft_recipe(), training), blocks=blocks)
        base, tokenizer, _ = open_start(model)
        writer = load(model)
        corpus = python_corpus()
        data = own_text(writer, prompts_from(writer, corpus.learned, prompts), 96)
        held_out = own_text(writer, prompts_from(writer, corpus.held_out, max(2, prompts // 8)), 96)
        return tune(
            recipe, model, base, tokenizer, data.counting_all(), held_out.counting_all(), out,
            corpus=f"its own answers, {corpus.description}",
        )  # fmt: skip

    _run(out, start, resume=resume, given=bool(training), json_output=json_output)


def _changed(recipe: Recipe, training: str, memory: str = "full") -> Recipe:
    from plait.train import changed

    return dataclasses.replace(recipe, training=changed(recipe.training, training), memory=memory)


def _run(out: Path, start: Callable[[], Trainer], *, resume: bool, given: bool, json_output: bool) -> None:
    """Start a run or resume it, train, and print what came of it."""
    from plait.train import check_folder, finish
    from plait.train import resume as resumed

    if resume and given:
        raise typer.BadParameter("a run is resumed as it was started; give --out and --resume only.")
    if not resume:
        # Before anything is written that takes long.
        check_folder(out)
    trainer = resumed(out) if resume else start()
    steps = trainer.config.training.steps
    try:
        result = finish(trainer, out)
    except KeyboardInterrupt:
        say(f"saved after step {trainer.step} of {steps}; go on with the same command and --resume")
        raise
    if json_output:
        print_json(result._asdict())
        return
    for name, value in result._asdict().items():
        if value is not None:
            typer.echo(
                f"{name.replace('_', ' '):<16} {f'{value:,.4f}' if isinstance(value, float) else value}"
            )
    adapted = trainer.config.start if trainer.config.adapter else None
    chosen = f"--model {adapted} --adapter {out}" if adapted else f"--model {out}"
    say(f'Try it: plait run --plain {chosen} "..."')


def _read(paths: list[Path]) -> Corpus:
    """Text files as a corpus."""
    from plait.train import Corpus

    if not paths:
        raise typer.BadParameter("give text files, or --resume.")
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} could not be read as UTF-8 text: {error}.") from None
    names = ", ".join(path.name for path in paths)
    return Corpus(texts[:-1] or texts, texts[-1:] if len(texts) > 1 else [], names)
