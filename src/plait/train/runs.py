"""From a recipe and texts to a trained model in a folder that `plait.load` opens.

The folder holds the model, and in `training` what the run needs to go on: data, checkpoint, curve.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from plait.engine.loading import open_model, read_text_side
from plait.engine.quantizing import copy_text_side
from plait.errors import ConfigError, IncompatibleError
from plait.files import write_text
from plait.hub import resolve
from plait.nn import (
    Adapter,
    RandomParameters,
    Transformer,
    Tuned,
    load_transformer,
    new_adapter,
    open_tuned,
    save_adapter,
    save_transformer,
    save_tuned,
)
from plait.nn.adapter_files import written_names
from plait.nn.checkpoints import model_file, open_checkpoint
from plait.nn.checkpoints.packed import PACKED_NAME
from plait.nn.save import GivenParameters, named_tensors, written_settings
from plait.text import ChatTemplate, Tokenizer, learn_byte_bpe
from plait.text.byte_bpe import PLACEHOLDER
from plait.train.config import RunConfig
from plait.train.corpus import Corpus, encoded
from plait.train.data import TokenData
from plait.train.loop import CHECKPOINT, Trainer
from plait.train.objectives import Objective
from plait.train.recipes import Recipe
from plait.train.tuners import Tuner
from plait.weights import Packed
from plait.weights.adapters import AdapterConfig
from plait.weights.ggml import FP32

__all__ = [
    "RunResult",
    "check_folder",
    "finish",
    "fresh_parameters",
    "open_start",
    "prepare",
    "resume",
    "train_new",
    "tune",
    "tune_adapter",
    "tune_weights",
]

_STATE, _DATA, _HELD_OUT, _RESULT = "training", "data.safetensors", "held_out.safetensors", "result.json"


class RunResult(NamedTuple):
    """What a run came to.

    Attributes:
        folder: of the model, or of the adapter.
        objective: as a spec string.
        parameters: of the model, or of the adapter.
        steps, tokens: done.
        loss: mean of the last steps' losses, at most 20, in nats a token.
        held_out_before, held_out: loss on held-out text before the first step and at the end; None where
            nothing was held out.
        seconds: of this call.
    """

    folder: str
    objective: str
    parameters: int
    steps: int
    tokens: int
    loss: float
    held_out_before: float | None
    held_out: float | None
    seconds: float


def prepare(
    folder: Path,
    config: RunConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    data: TokenData,
    held_out: TokenData | None,
) -> Trainer:
    """Put into a folder what a run needs, and return the run.

    Raises:
        ConfigError: the folder holds a run or a model, or the model is of a family that is not written.
    """
    state = folder / _STATE
    check_folder(folder)
    written_settings(config.model)
    state.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    data.save(state / _DATA)
    if held_out is not None:
        held_out.save(state / _HELD_OUT)
    return Trainer(config, model, data, held_out, state)


def check_folder(folder: Path) -> None:
    """Raise `ConfigError` if a folder holds a run or a model, which a new run would write over."""
    if (folder / _STATE / CHECKPOINT).exists():
        raise ConfigError(f"{folder} holds a run. Resume it, or choose another folder.")
    if model_file(folder) is not None:
        raise ConfigError(f"{folder} holds a model. Choose another folder.")


def resume(folder: Path) -> Trainer:
    """The run in a folder, where its last checkpoint left it.

    Raises:
        ModelFileError: there is none, or it is damaged.
    """
    state = folder / _STATE
    held_out = TokenData.load(state / _HELD_OUT) if (state / _HELD_OUT).exists() else None
    return Trainer.resume(TokenData.load(state / _DATA), held_out, state, _open_base)


def finish(trainer: Trainer, folder: Path) -> RunResult:
    """Train to the end and write the model beside its tokenizer, or the adapter."""
    started = time.monotonic()
    what = trainer.config.adapter or trainer.config.tuner or trainer.config.objective
    done = trainer.run(str(what))
    if trainer.adapter is not None:
        save_adapter(trainer.adapter, trainer.model, folder, base=trainer.config.start)
    elif trainer.tuned is not None:
        config = trainer.config
        facts = {"method": str(config.tuner), "objective": str(config.objective), "steps": done.steps}
        save_tuned(
            trainer.tuned, config.start, folder, facts | {"teacher": config.teacher, "text": config.corpus}
        )
    else:
        ends = sorted(Tokenizer.from_json(folder).eos_ids)
        save_transformer(trainer.model, folder, eos_token_id=ends or None)
    last = done.losses[-20:]
    result = RunResult(
        folder=str(folder),
        objective=str(trainer.config.objective),
        parameters=sum(parameter.numel() for parameter in trainer.trained.parameters()),
        steps=done.steps,
        tokens=done.tokens,
        loss=sum(last) / len(last),
        held_out_before=done.held_out[0][1] if done.held_out else None,
        held_out=done.held_out[-1][1] if done.held_out else None,
        seconds=round(time.monotonic() - started, 1),
    )
    write_text(folder / _STATE / _RESULT, json.dumps(result._asdict(), indent=2) + "\n")
    return result


def train_new(recipe: Recipe, corpus: Corpus, folder: Path) -> Trainer:
    """A run of a new model, whose vocabulary is learned from the texts.

    Raises:
        ConfigError: the recipe has no shape, the texts are too short, or the folder holds a run or a model.
    """
    if recipe.shape is None:
        raise ConfigError("A new model needs a shape. Give the recipe one, or tune a model.")
    if recipe.training.context > recipe.shape.context:
        raise ConfigError(
            f"Training.context must be at most the model's context of {recipe.shape.context}. "
            f"Got {recipe.training.context}."
        )
    tokenizer = learn_byte_bpe(corpus.learned, recipe.shape.vocab_size)
    model = recipe.shape.transformer(tokenizer.vocab_size, tokenizer.id_of(PLACEHOLDER))
    config = RunConfig(
        model=model,
        objective=recipe.objective,
        training=recipe.training,
        corpus=corpus.description,
        memory=recipe.memory,
    )
    data, held_out = _encoded(corpus, tokenizer, recipe)
    fresh = Transformer(model, fresh_parameters(model.blocks, recipe.training.seed))
    return prepare(folder, config, fresh, tokenizer, data, held_out)


def tune(
    recipe: Recipe,
    start: str,
    model: Transformer,
    tokenizer: Tokenizer,
    data: TokenData,
    held_out: TokenData | None,
    folder: Path,
    *,
    corpus: str,
    template: ChatTemplate | None = None,
) -> Trainer:
    """A run that starts from a model.

    Args:
        recipe: with `blocks`, of a shallower model: evenly spread blocks, the first and last among them.
        start: what the model is called.
        model: see `open_start`; it annotates the data too.
        tokenizer: of the model.
        data, held_out: to learn from and to measure on.
        folder: where to.
        corpus: what the data is, in words.
        template: of the model, to be kept beside it.

    Raises:
        ConfigError: more blocks than the model has, or the folder holds a run or a model.
    """
    teacher = model
    if recipe.blocks is not None:
        count = len(model.config.blocks)
        if not 1 <= recipe.blocks <= count:
            raise ConfigError(f"Recipe.blocks must be from 1 to the model's {count}. Got {recipe.blocks}.")
        model = model.with_blocks(spread(recipe.blocks, count))
    own = Transformer(model.config, GivenParameters(named_tensors(model)))
    objective: Objective = recipe.objective
    config = RunConfig(
        model=own.config,
        objective=objective,
        training=recipe.training,
        start=start,
        corpus=corpus,
        memory=recipe.memory,
    )
    data = objective.annotate(data, teacher)
    held_out = None if held_out is None else objective.annotate(held_out.first(recipe.measured), teacher)
    trainer = prepare(folder, config, own, tokenizer, data, held_out)
    if template is not None:
        write_text(folder / "chat_template.jinja", template.source)
    return trainer


def tune_adapter(
    method: AdapterConfig,
    start: str,
    data: Callable[[Tokenizer], tuple[TokenData, TokenData | None]],
    folder: Path,
    *,
    weights: str = "auto",
    original: str = "",
    recipe: Recipe,
    corpus: str = "",
) -> Trainer:
    """A run that trains an adapter on a model, whose matrices stay packed as they are.

    Args:
        method: of the adapter.
        start: the model, as `plait.load` takes it.
        data: makes what is learned from, and what is measured on, with the model's tokenizer.
        folder: where to.
        weights: how the model is kept, as `plait.load` takes it.
        original: the model that it was packed from, for methods that start from what packing lost; else empty.
        recipe: how to train.
        corpus: what the data is, in words.

    Raises:
        ConfigError: the folder holds a run or a model, the model has none of the targets, its adapters are not written, or the
            original is missing or superfluous.
    """
    state = folder / _STATE
    check_folder(folder)
    model, tokenizer, _ = open_model(resolve(start), weights)
    if original and not method.needs_original:
        raise ConfigError(
            f"{method} starts without the original. Leave it out, or choose a method that needs it, such as "
            "lora:start=loftq."
        )
    adapter = new_adapter(method, model, seed=recipe.training.seed, original=_original(original))
    written_names(adapter, model)
    learned, held_out = data(tokenizer)
    held_out = None if held_out is None else held_out.first(recipe.measured)
    config = RunConfig(
        model=model.config, objective=recipe.objective, training=recipe.training, start=start, corpus=corpus,
        adapter=method, weights=weights, base=adapter.base, original=original, memory=recipe.memory,
    )  # fmt: skip
    state.mkdir(parents=True, exist_ok=True)
    learned.save(state / _DATA)
    if held_out is not None:
        held_out.save(state / _HELD_OUT)
    return Trainer(config, model, learned, held_out, state, adapter)


def tune_weights(
    method: Tuner,
    start: str | Path,
    teacher: str,
    data: Callable[[Tokenizer], tuple[TokenData, TokenData | None]],
    folder: Path,
    *,
    recipe: Recipe,
    corpus: str = "",
) -> Trainer:
    """A run that tunes a packed model towards the model that it was packed from.

    Scales, codebooks, norms and biases are trained; what happens to codes is the method's. The folder gets a packed
    model of the same formats and bytes, which `plait.load` opens.

    Args:
        method: how codes are chosen anew.
        start: folder of the packed model, from `plait quantize`.
        teacher: the model that it was packed from, as `plait.load` takes it; read in fp32.
        data: makes what is learned from, and what is measured on, with the teacher's tokenizer.
        folder: where to.
        recipe: what is learned, and how.
        corpus: what the data is, in words.

    Raises:
        ConfigError: the folder holds a run or a model, or `start` holds no packed model.
        IncompatibleError: the formats of `start` are not tuned, or the teacher is another model.
    """
    state = folder / _STATE
    check_folder(folder)
    model, tuned = open_tuned(start)
    original, tokenizer, _ = open_start(teacher)
    if original.config.vocab_size != model.config.vocab_size:
        raise IncompatibleError(
            f"{teacher} has {original.config.vocab_size} tokens and {start} has {model.config.vocab_size}. "
            "Give the model that was packed."
        )
    learned, held_out = data(tokenizer)
    learned = recipe.objective.annotate(learned, original)
    if held_out is not None:
        held_out = recipe.objective.annotate(held_out.first(recipe.measured), original)
    dense = named_tensors(original)
    for name, matrix in tuned.matrices.items():
        method.prepare(matrix, dense.get(name))
    del original, dense
    config = RunConfig(
        model=model.config, objective=recipe.objective, training=recipe.training, start=str(start), corpus=corpus,
        base=_packed_base(start), tuner=method, teacher=teacher, memory=recipe.memory,
    )  # fmt: skip
    state.mkdir(parents=True, exist_ok=True)
    with open_checkpoint(Path(start)) as checkpoint:
        copy_text_side(checkpoint, folder)
    learned.save(state / _DATA)
    if held_out is not None:
        held_out.save(state / _HELD_OUT)
    return Trainer(config, model, learned, held_out, state, tuned=tuned)


def _packed_base(start: str | Path) -> str:
    """Fingerprint of a packed model."""
    return hashlib.sha256((Path(start) / PACKED_NAME).read_bytes()).hexdigest()


def _open_base(config: RunConfig) -> tuple[Transformer, Adapter | None, Tuned | None]:
    """The model, and what a run trains of it or beside it.

    Raises:
        ConfigError: the model is no longer the one that the run started from.
    """
    changed = f"{config.start} is not the model that the run started from. Bring that one back."
    if config.tuner is not None:
        model, tuned = open_tuned(config.start)
        if _packed_base(config.start) != config.base:
            raise ConfigError(changed)
        for matrix in tuned.matrices.values():
            # What the model was packed from is not needed: buffers are read from the checkpoint.
            config.tuner.prepare(matrix, torch.zeros(matrix.shape))
        return model, None, tuned
    assert config.adapter is not None
    model, _, _ = open_model(resolve(config.start), config.weights)
    adapter = new_adapter(
        config.adapter, model, seed=config.training.seed, original=_original(config.original)
    )
    if adapter.base != config.base:
        raise ConfigError(changed)
    return model, adapter, None


def _original(name: str) -> Transformer | None:
    """The model that another was packed from, as its file has it; None for no name."""
    return open_model(resolve(name), "file")[0] if name else None


def spread(chosen: int, count: int) -> list[int]:
    """Evenly spread indices of `count` blocks, the first and the last among them where there is room."""
    if chosen == 1:
        return [0]
    return [round(index * (count - 1) / (chosen - 1)) for index in range(chosen)]


def open_start(
    name: str, *, placeholder: str | None = None
) -> tuple[Transformer, Tokenizer, ChatTemplate | None]:
    """A model to start from, in fp32 and torch, with its tokenizer and chat template.

    Args:
        name: as `plait.load` takes it.
        placeholder: the token that stands for one that is not known yet, where the model has none.

    Raises:
        ConfigError: the vocabulary has no token of that name, or it is not one that text never holds.
    """
    with open_checkpoint(resolve(name)) as checkpoint:
        model = load_transformer(checkpoint, FP32())
        tokenizer, template = read_text_side(checkpoint)
    if placeholder is not None and model.config.placeholder is None:
        id = tokenizer.id_of(placeholder)
        if id is None or id not in tokenizer.special_ids or id in tokenizer.eos_ids | {tokenizer.bos_id}:
            raise ConfigError(
                f"{placeholder!r} is no token that {name} can spare: it must be special, and neither start nor end "
                "a text. Name another one."
            )
        model.config = replace(model.config, placeholder=id)
    return model, tokenizer, template


def fresh_parameters(blocks: Sequence[object], seed: int) -> RandomParameters:
    """Random parameters in which the blocks' outputs are small, so that a deep sum of them is not large."""
    return _Scaled(seed, (2 * len(blocks)) ** -0.5)


class _Scaled(RandomParameters):
    def __init__(self, seed: int, scale: float) -> None:
        super().__init__(seed)
        self.scale = scale

    def matrix(self, names: Sequence[str], columns: int, rows: Sequence[int]) -> Packed:
        made = super().matrix(names, columns, rows)
        if names[0].endswith(("mixer.output.weight", "feed_forward.down.weight")):
            with torch.no_grad():
                for weight in made.parameters():
                    weight.mul_(self.scale)
        return made


def _encoded(corpus: Corpus, tokenizer: Tokenizer, recipe: Recipe) -> tuple[TokenData, TokenData | None]:
    held_out = encoded(corpus.held_out, tokenizer).first(recipe.measured) if corpus.held_out else None
    return encoded(corpus.learned, tokenizer), held_out
