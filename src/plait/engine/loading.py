"""`plait.load`: from a name to a model that answers."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal

from plait.decode.speculate import SPECULATORS, Nothing
from plait.engine.language_model import LanguageModel
from plait.errors import ConfigError, IncompatibleError
from plait.files import write_text
from plait.hub import Progress, resolve
from plait.memory import MemoryPlan
from plait.nn import Transformer, load_adapter, load_transformer, lower, save_transformer
from plait.nn.checkpoints import Checkpoint, model_file, open_checkpoint
from plait.text import ChatTemplate, Tokenizer
from plait.weights import FORMATS, Elastic
from plait.weights.ggml import FP32

__all__ = ["load", "merge_adapter", "open_model"]


def load(
    name: str | Path,
    *,
    weights: str = "auto",
    memory: str = "full",
    draft: str = "none",
    draft_model: str | Path | None = None,
    adapter: str | Path | None = None,
    angles: Literal["fp64", "fp32"] = "fp64",
    offline: bool | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a model.

    Args:
        name: an alias (`smollm2`), a folder with safetensors or from `plait quantize`, a `.gguf` file, or a hub id (`owner/name`).
        weights: how matrices are kept: a weight format such as `fp32`, `bf16` or `q4_0`, `file` to keep
            each as it is stored, `bitmod:bits=4` and other formats of few bits for the matrices of the blocks
            (embedding and head then stay in the codes that they have, or in q8_0), `bitstack:budget=64MB` to read
            that much of a file made with `plait quantize --format bitstack`, or `auto`: as stored where the native operations can multiply them so
            (their activations are then rounded to 8 bits), else `fp32`.
        memory: codec and policy of the past, such as `full`, `window:size=1024` or `dense:dtype=bf16`.
        draft: how continuations are guessed, such as `none`, `prompt-lookup` or `token-recycling:nodes=16`.
            The law of the answer does not depend on it.
        draft_model: a smaller model of the same vocabulary for drafts that guess with one, such as `chain`
            and `rsd-s`; named as `name` is, and held in the same `weights`.
        adapter: the folder of an adapter to answer with, as the `peft` package or `plait train adapter` writes it; more
            are added with `lm.adapters.add`.
        angles: precision of rotary angles; `fp32` repeats the rounding of Hugging Face Transformers.
        offline: never touch the network; the environment variable PLAIT_OFFLINE decides when left out.
        progress: told how a download goes.

    Raises:
        UnknownNameError: no model, format, method or speculator has that name.
        IncompatibleError: the draft model has another vocabulary, or the draft has no use for one.
        ModelFileError: the files are damaged, incomplete or of an unknown kind.
        DownloadError: the model is not here and could not be brought.
    """
    plan = MemoryPlan.parse(memory)
    speculator = SPECULATORS.parse(draft)
    if weights not in ("auto", "file"):
        format = FORMATS.parse(weights)
        if format.needs and not isinstance(format, Elastic):
            raise ConfigError(
                f"{format} needs calibration text, which load does not take. Make a folder with plait quantize, "
                "and load that."
            )
    path = resolve(str(name), progress=progress, offline=offline)
    model, tokenizer, template = open_model(path, weights, angles)
    guesser = None
    if draft_model is not None:
        guesser_path = resolve(str(draft_model), progress=progress, offline=offline)
        guesser, guesser_tokenizer, _ = open_model(guesser_path, weights, angles)
        if not tokenizer.has_ids_of(guesser_tokenizer):
            raise IncompatibleError(
                f"{name} and {draft_model} number their tokens differently. "
                "Choose a draft model of the same family."
            )
    lm = LanguageModel(
        name=str(name),
        model=model,
        tokenizer=tokenizer,
        chat_template=template,
        plan=plan,
        draft=speculator,
        draft_model=guesser,
    )
    if adapter is not None:
        lm.adapters.add(adapter, use=True)
    if not isinstance(speculator, Nothing):
        # A model that takes no drafts says so to the first request.
        with contextlib.suppress(IncompatibleError):
            lm.time_passes()
    return lm


def open_model(
    path: Path, weights: str = "auto", angles: Literal["fp64", "fp32"] = "fp64"
) -> tuple[Transformer, Tokenizer, ChatTemplate | None]:
    """A model and its text side, with matrices kept as `weights` of `load` says."""
    format = None if weights in ("auto", "file") else FORMATS.parse(weights)
    with open_checkpoint(path) as checkpoint:
        model = load_transformer(checkpoint, format, angles=angles)
        if not lower(model) and weights == "auto":
            model = load_transformer(checkpoint, FP32(), angles=angles)
        return model, *read_text_side(checkpoint)


def merge_adapter(
    name: str | Path, adapter: str | Path, folder: str | Path, *, offline: bool | None = None
) -> Path:
    """Write a model into which an adapter is merged, in fp32, with its tokenizer and chat template.

    Args:
        name: the model that the adapter is for, as `load` takes it; packed matrices are unpacked first.
        adapter: folder of the adapter.
        folder: of the new model.

    Raises:
        ConfigError: the folder holds a model, or models of this family are not written.
        IncompatibleError: the method cannot be merged into this model.
        ModelFileError: the files are damaged, or do not fit each other.
    """
    folder = Path(folder)
    if model_file(folder) is not None:
        raise ConfigError(f"{folder} holds a model. Choose another folder.")
    with open_checkpoint(resolve(str(name), offline=offline)) as checkpoint:
        model = load_transformer(checkpoint, FP32())
        tokenizer, template = read_text_side(checkpoint)
    load_adapter(adapter, model).merge()
    save_transformer(model, folder, eos_token_id=sorted(tokenizer.eos_ids) or None)
    tokenizer.save(folder)
    if template is not None:
        write_text(folder / "chat_template.jinja", template.source)
    return folder


def read_text_side(checkpoint: Checkpoint) -> tuple[Tokenizer, ChatTemplate | None]:
    """The tokenizer and chat template that belong to a checkpoint; None if it was not made for chat."""
    metadata = checkpoint.metadata
    if "general.architecture" in metadata:
        tokenizer = Tokenizer.from_gguf(metadata)
        with contextlib.suppress(ConfigError):
            return tokenizer, ChatTemplate.from_gguf(metadata)
    else:
        tokenizer = Tokenizer.from_json(checkpoint.path)
        with contextlib.suppress(ConfigError):
            return tokenizer, ChatTemplate.from_folder(checkpoint.path)
    return tokenizer, None
