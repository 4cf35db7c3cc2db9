"""From a model to a folder that Plait and Hugging Face Transformers open."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from plait.errors import ConfigError
from plait.files import replacing, write_text
from plait.nn.checkpoints.safetensors import SINGLE_NAME
from plait.nn.config import TransformerConfig
from plait.nn.families import FAMILIES, Family, Settings
from plait.nn.parameters import Parameters
from plait.nn.transformer import Transformer
from plait.weights import Dense, Packed

__all__ = ["GivenParameters", "named_tensors", "save_transformer", "written_settings"]


def save_transformer(model: Transformer, folder: Path, **more: Any) -> None:
    """Write `model.safetensors` (fp32) and `config.json`; each file is replaced whole.

    Args:
        model: of a family that is written, whatever form its matrices have.
        folder: where to; it is made if need be.
        more: further entries of `config.json`, such as `eos_token_id`.

    Raises:
        ConfigError: the family is not written, or its `config.json` cannot say what the model is.
    """
    family, settings = written_settings(model.config)
    tensors = named_tensors(model)
    if model.config.tied_head:
        tensors.pop("head.weight", None)
    entries = family.names(model.config)
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for ours, tensor in tensors.items():
        entry = entries[ours]
        assert entry.reorder is None, "only files of other kinds order rows differently"
        part = tensor - entry.plus if entry.plus else tensor
        first = 0 if entry.rows is None else entry.rows.start or 0
        parts.setdefault(entry.name, []).append((first, part))
    transposed = {entries[ours].name for ours in tensors if entries[ours].transposed}
    stored: dict[str, Tensor] = {}
    for name, pieces in parts.items():
        whole = torch.cat([part for _, part in sorted(pieces, key=lambda piece: piece[0])])
        stored[name] = (whole.t() if name in transposed else whole).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / SINGLE_NAME) as beside:
        save_file(stored, beside, metadata={"format": "pt"})
    write_text(folder / "config.json", json.dumps({**settings, "dtype": "float32", **more}, indent=2) + "\n")


def written_settings(config: TransformerConfig) -> tuple[Family, dict[str, Any]]:
    """The family of a model, and the `config.json` that describes it.

    Raises:
        ConfigError: the family is not written, or reading the settings would give another model.
    """
    written = {family.name: family for family in FAMILIES if family.settings is not None}
    family = written.get(config.family)
    if family is None or family.settings is None:
        raise ConfigError(
            f"Models of family {config.family!r} are read, but not written. Written are: {', '.join(written)}."
        )
    try:
        settings = family.settings(config)
        read = family.config(Settings(settings))
    except (AssertionError, IndexError):
        read = None
    if read is None or read != replace(config, family=read.family):
        raise ConfigError(
            f"A config.json of family {family.name} cannot describe this model: its blocks differ, or have what the "
            "family has not. Change the model to plain rotary attention in equal blocks, or its family to plait, "
            "which is written with any attention."
        )
    return family, settings


def named_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every parameter by the architecture's name (`blocks.0.mixer.query.weight`), dense fp32, on the CPU.

    Parameters that are kept stacked are taken apart, and packed ones are unpacked.
    """
    calls = _Calls()
    with torch.no_grad():
        # The same modules with a number in place of every parameter: that of the call that made it.
        twin = Transformer(model.config, calls)
        held: dict[str, Tensor] = dict(model.named_parameters())
        for name, module in model.named_modules():
            if isinstance(module, Packed):
                held.setdefault(f"{name}.weight", module.unpack())
        named: dict[str, Tensor] = {}
        for name, number in twin.named_parameters():
            names, sizes = calls.made[int(number.flatten()[0])]
            parts = held[name].detach().to("cpu", torch.float32).split(sizes)
            named |= dict(zip(names, parts, strict=True))
    return named


class GivenParameters(Parameters):
    """Parameters from a table by the architecture's names; trainable copies in fp32.

    Args:
        tensors: as `named_tensors` gives them.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def matrix(self, names: Sequence[str], columns: int, rows: Sequence[int]) -> Packed:
        return Dense(self.vector(names, rows))

    def vector(self, names: Sequence[str], sizes: Sequence[int]) -> Tensor:
        return torch.cat([self.tensors[name] for name in names]).to(torch.float32, copy=True)


class _Calls(Parameters):
    """Remembers which parameters were asked for together."""

    def __init__(self) -> None:
        self.made: list[tuple[list[str], list[int]]] = []

    def matrix(self, names: Sequence[str], columns: int, rows: Sequence[int]) -> Packed:
        return Dense(self.vector(names, rows)[:, None])

    def vector(self, names: Sequence[str], sizes: Sequence[int]) -> Tensor:
        self.made.append((list(names), list(sizes)))
        return torch.tensor([float(len(self.made) - 1)])
