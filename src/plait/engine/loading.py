"""`plait.load`: from a name to a model that answers."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal

from plait.decode.speculate import SPECULATORS
from plait.engine.language_model import LanguageModel
from plait.errors import ConfigError
from plait.hub import Progress, resolve
from plait.memory import MemoryPlan
from plait.nn import load_transformer, lower
from plait.nn.checkpoints import Checkpoint, open_checkpoint
from plait.text import ChatTemplate, Tokenizer
from plait.weights import FORMATS
from plait.weights.ggml import FP32

__all__ = ["load"]


def load(
    name: str | Path,
    *,
    weights: str = "auto",
    memory: str = "full",
    draft: str = "none",
    angles: Literal["fp64", "fp32"] = "fp64",
    offline: bool | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a model.

    Args:
        name: an alias (`smollm2`), a folder with safetensors, a `.gguf` file, or a hub id (`owner/name`).
        weights: how matrices are kept: a weight format such as `fp32`, `bf16` or `q4_0`, `file` to keep
            each as it is stored, or `auto`: as stored where the native operations can multiply them so
            (their activations are then rounded to 8 bits), else `fp32`.
        memory: codec and policy of the past, such as `full`, `window:size=1024` or `dense:dtype=bf16`.
        draft: how continuations are guessed, such as `none`, `prompt-lookup` or `token-recycling:nodes=16`.
            The law of the answer does not depend on it.
        angles: precision of rotary angles; `fp32` repeats the rounding of Hugging Face Transformers.
        offline: never touch the network; the environment variable PLAIT_OFFLINE decides when left out.
        progress: told how a download goes.

    Raises:
        UnknownNameError: no model, format, method or speculator has that name.
        ModelFileError: the files are damaged, incomplete or of an unknown kind.
        DownloadError: the model is not here and could not be brought.
    """
    plan = MemoryPlan.parse(memory)
    speculator = SPECULATORS.parse(draft)
    format = None if weights in ("auto", "file") else FORMATS.parse(weights)
    path = resolve(str(name), progress=progress, offline=offline)
    with open_checkpoint(path) as checkpoint:
        model = load_transformer(checkpoint, format, angles=angles)
        if not lower(model) and weights == "auto":
            model = load_transformer(checkpoint, FP32(), angles=angles)
        tokenizer, template = read_text_side(checkpoint)
    return LanguageModel(
        name=str(name),
        model=model,
        tokenizer=tokenizer,
        chat_template=template,
        plan=plan,
        draft=speculator,
    )


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
