"""Checkpoints: everything that a run needs to go on exactly, in one safetensors file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from plait.errors import ConfigError, ModelFileError
from plait.files import remove_leftovers, replacing
from plait.train.config import RunConfig

__all__ = ["Checkpoint", "load_checkpoint", "optimizer_tensors", "restore", "save_checkpoint"]

_VERSION = 1


@dataclass
class Checkpoint:
    """Where a run is.

    Args:
        config: of the run.
        data: fingerprint of what it is trained on.
        step: steps that are done; the next batch has this number.
        losses: (step,) float64, the loss of every step.
        evaluations: step and held-out loss of every measurement, (n, 2) float64.
        tensors: parameters, optimizer state and random state, by name.
    """

    config: RunConfig
    data: str
    step: int
    losses: Tensor
    evaluations: Tensor
    tensors: dict[str, Tensor]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Replace the file in one step: whoever is killed meanwhile still has the old one.

    Raises:
        OSError: the disk is full; the old file is untouched.
    """
    tensors = {
        **checkpoint.tensors,
        "history.losses": checkpoint.losses,
        "history.evaluations": checkpoint.evaluations,
    }
    metadata = {
        "version": _VERSION,
        "config": checkpoint.config.to_json(),
        "data": checkpoint.data,
        "step": checkpoint.step,
    }
    remove_leftovers(path)
    with replacing(path) as beside:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            beside,
            metadata={"plait.training": json.dumps(metadata)},
        )


def load_checkpoint(path: Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote.

    Raises:
        ModelFileError: the file is missing, damaged, of another kind, or of a later version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {})["plait.training"])
            if facts["version"] != _VERSION:
                raise ModelFileError(
                    f"{path} is a checkpoint of version {facts['version']}; this Plait reads {_VERSION}."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Checkpoint(
            RunConfig.from_json(facts["config"]),
            facts["data"],
            facts["step"],
            tensors.pop("history.losses"),
            tensors.pop("history.evaluations"),
            tensors,
        )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ModelFileError(
            f"{path} is no checkpoint to resume from ({type(error).__name__}: {error}). "
            "Start the run again in another folder."
        ) from error


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, buffers, optimizer state and random state, by name."""
    tensors = {"random": torch.get_rng_state()}
    tensors |= {f"buffer.{name}": buffer for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        ConfigError: the tensors are those of another model.
    """
    names = dict(model.named_parameters())
    held = {name.removeprefix("model.") for name in tensors if name.startswith("model.")}
    wrong = names.keys() ^ held or {n for n in held if names[n].shape != tensors[f"model.{n}"].shape}
    if wrong:
        raise ConfigError(f"The checkpoint is of another model: {sorted(wrong)[0]} does not match.")
    torch.set_rng_state(tensors["random"])
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(tensors[f"buffer.{name}"])
        for name, parameter in names.items():
            parameter.copy_(tensors[f"model.{name}"])
            prefix = f"optimizer.{name}."
            state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            if state:
                # Copies, which torch aligns as it does everything else; a mapped file may lie anywhere.
                optimizer.state[parameter] = {key: tensor.clone() for key, tensor in state.items()}
