"""A packed model in the form in which it is tuned, and the file that comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import ConfigError
from plait.nn.checkpoints.packed import PACKED_NAME, PackedCheckpoint, write_packed
from plait.nn.load import describe
from plait.nn.parameters import OUTER, CheckpointParameters
from plait.nn.quantize import Recorder
from plait.nn.transformer import Transformer
from plait.weights import Packed, Tunable, tunable

__all__ = ["Tuned", "open_tuned", "save_tuned"]


class Tuned(nn.Module):
    """What is tuned of a packed model: the matrices of its blocks, and its norms and biases.

    Args:
        matrices: by name.
        norms: parameters of norms and biases, by the names of the model's modules.
        outer: matrices that are not tuned, by name.
        vectors: all vectors by the architecture's names, in the memory that `norms` train.
    """

    def __init__(
        self,
        matrices: Mapping[str, Tunable],
        norms: Mapping[str, nn.Parameter],
        outer: Mapping[str, Packed],
        vectors: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.matrices, self.outer, self.vectors = dict(matrices), dict(outer), dict(vectors)
        # Names of modules hold no dots.
        self.held = nn.ModuleDict({name.replace(".", "/"): matrix for name, matrix in self.matrices.items()})
        self.norms = nn.ParameterDict({name.replace(".", "/"): norm for name, norm in norms.items()})


def open_tuned(folder: str | Path) -> tuple[Transformer, Tuned]:
    """A model from `plait quantize`, its blocks ready to be trained.

    Raises:
        ConfigError: the folder holds no packed model, or a stack of blocks.
        IncompatibleError: a matrix is in a format that is not tuned.
        ModelFileError: the file is damaged.
    """
    with _opened(folder) as checkpoint:
        _, config, entries = describe(checkpoint)
        source = CheckpointParameters(checkpoint, entries, None)
        recorder = Recorder(source, lambda name, packed: packed if name in OUTER else tunable(packed, name))
        with torch.no_grad():
            model = Transformer(config, recorder)
    forms = recorder.forms()
    matrices = {name: packed for name, packed in forms.items() if isinstance(packed, Tunable)}
    inside = {id(parameter) for matrix in matrices.values() for parameter in matrix.parameters()}
    norms = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 and id(parameter) not in inside
    }
    for parameter in norms.values():
        parameter.requires_grad_(True)
    outer = {name: packed for name, packed in forms.items() if name not in matrices}
    return model, Tuned(matrices, norms, outer, recorder.vectors)


def save_tuned(tuned: Tuned, source: str | Path, folder: Path, made: Mapping[str, Any]) -> Path:
    """Write the packed file of a tuned model; the folder's other files are the caller's.

    Args:
        tuned: as it is now; its numbers are rounded as their formats keep them.
        source: the folder that it was opened from.
        made: how it was tuned, for the header.

    Raises:
        ConfigError: a number is NaN, or above what its format holds.
        OSError: the disk is full; an older file is untouched.
    """
    with _opened(source) as checkpoint:
        header: dict[str, Any] = {
            "config": checkpoint.config,
            "matrices": {},
            "made": {**checkpoint.made, "tuned": dict(made)},
        }
        parts: dict[str, dict[str, Tensor]] = {}
        packed: Packed
        for name, matrix in {**tuned.outer, **tuned.matrices}.items():
            try:
                packed = matrix.packed() if isinstance(matrix, Tunable) else matrix
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from error
            header["matrices"][name] = {
                "kind": packed.kind,
                "shape": list(packed.shape),
                "settings": packed.settings(),
                "spec": checkpoint.spec(name),
            }
            parts[name] = packed.tensors()
        write_packed(folder / PACKED_NAME, header, parts, tuned.vectors)
    return folder / PACKED_NAME


def _opened(folder: str | Path) -> PackedCheckpoint:
    if not (Path(folder) / PACKED_NAME).exists():
        raise ConfigError(f"{folder} holds no packed model. Make one with plait quantize, and tune that.")
    checkpoint = PackedCheckpoint(folder)
    if checkpoint.order is not None:
        raise ConfigError(f"{folder} holds a stack of blocks, which is not tuned. Pack the model in codes.")
    return checkpoint
