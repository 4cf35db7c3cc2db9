"""Adapters in files: `adapter_config.json` and `adapter_model.safetensors`, as the `peft` package has them.

Kinds that `peft` does not know are written in the same two files, under a `peft_type` that begins with `PLAIT_`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from plait.errors import ConfigError, IncompatibleError, ModelFileError, suggestion
from plait.files import replacing, write_text
from plait.nn.adapters import Adapter, geometry_of, sites_of
from plait.nn.checkpoints.files import PICKLE_SUFFIXES, pickle_error, shown
from plait.nn.checkpoints.safetensors import SafetensorsCheckpoint, json_object
from plait.nn.families import FAMILIES
from plait.nn.transformer import Transformer
from plait.weights.adapters import ADAPTERS, PLACES, AdapterConfig, Change, DoRA, LoRA

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "AdapterFacts", "inspect_adapter", "load_adapter", "save_adapter"]

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_OWN = "PLAIT_"
_MAX_CONFIG_BYTES = 4 << 20


class AdapterFacts(NamedTuple):
    """What the files of an adapter say.

    Attributes:
        method: as a spec string.
        base: the model that it names.
        matrices: how many it changes.
        parameters: numbers that it keeps.
        nbytes: of the weights file.
    """

    method: str
    base: str
    matrices: int
    parameters: int
    nbytes: int


class _Module(NamedTuple):
    """A module of the model that a file addresses: the matrices in it, and their rows there."""

    parts: list[tuple[str, slice | None]]


def inspect_adapter(folder: str | Path) -> AdapterFacts:
    """What is in the files of an adapter, without a model.

    Raises:
        ModelFileError: they are missing, damaged, pickled or of an unknown kind.
    """
    path = Path(folder)
    raw = _config(path)
    config = _method(path, raw)
    with SafetensorsCheckpoint(path / WEIGHTS_NAME) as file:
        sizes = [(name, info.shape) for name, info in file.tensors().items()]
    endings = (
        [f".{theirs}" for theirs in config.changes.peft_names.values()] if hasattr(config, "changes") else []
    )
    modules = {name.removesuffix(ending) for name, _ in sizes for ending in endings if name.endswith(ending)}
    count = 0
    for _, shape in sizes:
        numbers = 1
        for side in shape:
            numbers *= side
        count += numbers
    return AdapterFacts(
        str(config),
        str(raw.get("base_model_name_or_path") or ""),
        len(modules),
        count,
        (path / WEIGHTS_NAME).stat().st_size,
    )


def load_adapter(folder: str | Path, model: Transformer, *, name: str | None = None) -> Adapter:
    """Read an adapter for a model.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        model: that it was made for; in any weight format.
        name: what to call it; the folder's name when left out.

    Raises:
        ModelFileError: the files are missing, damaged, pickled or of an unknown kind, or name modules or
            shapes that the model does not have.
        IncompatibleError: the adapter was made for another model.
    """
    path = Path(folder)
    raw = _config(path)
    config = _method(path, raw)
    with SafetensorsCheckpoint(path / WEIGHTS_NAME) as file:
        tensors = {key: file.load(key) for key in file.tensors()}
        notes = file.notes
    try:
        adapter = _bound(config, tensors, model, name or path.resolve().name)
    except ConfigError as error:
        raise ModelFileError(f"{path}: {error}") from error
    written = next((note.get("plait.base") for note in notes.values()), None)
    if written is not None and written != adapter.base:
        raise IncompatibleError(
            f"{path} was made for another model than this one, though its shapes fit. "
            f"It names {raw.get('base_model_name_or_path')!r}."
        )
    return adapter.eval()


def save_adapter(adapter: Adapter, model: Transformer, folder: Path, *, base: str = "") -> None:
    """Write an adapter; each file is replaced whole.

    Args:
        adapter: of `model`.
        folder: where to; it is made if need be.
        base: what the model is called.

    Raises:
        ConfigError: the model's files keep several matrices as one, where adapters of parts have no name.
    """
    place_of = written_names(adapter, model)
    tensors: dict[str, Tensor] = {}
    targets: set[str] = set()
    for site, change in adapter.at.items():
        module = place_of[site]
        targets.add(module.rpartition(".")[2])
        for parameter, theirs in change.peft_names.items():
            tensors[f"{_PREFIX}{module}.{theirs}"] = change.stored(parameter).detach().float().contiguous()
    if adapter.beginning is not None:
        tensors["prompt_embeddings"] = adapter.beginning.numbers.detach().float().contiguous()
    for ours, theirs in adapter.config.peft_shared.items():
        tensors[f"base_model.{theirs}"] = adapter.shared[ours].contiguous()
    settings = {
        "peft_type": adapter.config.peft_type or _OWN + adapter.config.name.upper(),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "target_modules": sorted(targets),
        "modules_to_save": None,
        **adapter.config.to_peft(),
        **adapter.config.peft_geometry(geometry_of(model)),
    }
    if adapter.beginning is not None:
        del settings["target_modules"], settings["modules_to_save"]
    if adapter.config.name == "ia3":
        settings["feedforward_modules"] = sorted(
            {place_of[site].rpartition(".")[2] for site in adapter.at if site.endswith(".down")}
        )
    if not adapter.config.peft_type:
        settings["plait"] = adapter.config.to_json()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS_NAME) as beside:
        save_file(tensors, beside, metadata={"format": "pt", "plait.base": adapter.base})
    write_text(folder / CONFIG_NAME, json.dumps(settings, indent=2) + "\n")


def written_names(adapter: Adapter, model: Transformer) -> dict[str, str]:
    """What files call the modules that hold an adapter's matrices, by the names of these.

    Raises:
        ConfigError: the model's files keep several matrices as one, where adapters of parts have no name.
    """
    modules = _modules(model)
    place_of = {part: module for module, held in modules.items() for part, _ in held.parts}
    for site in adapter.at:
        if len(modules[place_of[site]].parts) > 1:
            raise ConfigError(
                f"Files of {model.config.family} models keep {place_of[site]} as one matrix, and the adapter changes "
                "parts of it. Adapters of such models are read, but not written."
            )
    return {site: place_of[site] for site in adapter.at}


def _config(path: Path) -> dict[str, Any]:
    """The content of `adapter_config.json`, where the weights are there and can be read."""
    if not (path / WEIGHTS_NAME).exists():
        pickled = sorted(
            file for file in path.glob("adapter_model.*") if file.suffix.lower() in PICKLE_SUFFIXES
        )
        if pickled:
            raise pickle_error(pickled[0])
        raise ModelFileError(f"{path} holds no {WEIGHTS_NAME}. Give the folder of an adapter.")
    file = path / CONFIG_NAME
    try:
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise ModelFileError(f"{file} is larger than {_MAX_CONFIG_BYTES} bytes, which no adapter needs.")
        raw = file.read_bytes()
    except OSError as error:
        raise ModelFileError(
            f"{file} cannot be read: {error.strerror}. Give the folder of an adapter."
        ) from None
    return json_object(file, raw)


def _method(path: Path, raw: Mapping[str, Any]) -> AdapterConfig:
    kind = raw.get("peft_type")
    methods = [cls for cls in ADAPTERS.methods.values() if issubclass(cls, AdapterConfig)]
    known = {method.peft_type: method for method in methods if method.peft_type}
    try:
        if isinstance(kind, str) and kind.startswith(_OWN) and isinstance(raw.get("plait"), dict):
            return AdapterConfig.from_json(raw["plait"])
        if kind == "LORA":
            return (DoRA if raw.get("use_dora") else LoRA).from_peft(raw)
        if not isinstance(kind, str) or kind not in known:
            raise ConfigError(
                f"it is of peft_type {shown(str(kind))}, which is not read. Read are {', '.join(sorted(known))}."
            )
        return known[kind].from_peft(raw)
    except ConfigError as error:
        raise ModelFileError(f"{path / CONFIG_NAME}: {error}") from error


def _modules(model: Transformer) -> dict[str, _Module]:
    """The modules of a model as Hugging Face names them, with the matrices that each holds."""
    family = next(family for family in FAMILIES if family.name == model.config.family)
    modules: dict[str, _Module] = {}
    sites = sites_of(model)
    for ours, entry in family.names(model.config).items():
        site = ours.removesuffix(".weight")
        if ours.endswith(".weight") and site in sites:
            module = modules.setdefault(entry.name.removesuffix(".weight"), _Module([]))
            module.parts.append((site, entry.rows))
    return modules


def _bound(config: AdapterConfig, tensors: Mapping[str, Tensor], model: Transformer, name: str) -> Adapter:
    """The changes that tensors of a file describe, on a model."""
    if not hasattr(config, "changes"):
        numbers = config.restored_beginning(tensors, geometry_of(model))
        return Adapter(config, model, {}, name, beginning=numbers)
    modules, sites = _modules(model), sites_of(model)
    shared = {}
    rest = dict(tensors)
    for ours, theirs in config.peft_shared.items():
        key = f"base_model.{theirs}"
        if key not in rest:
            raise ConfigError(f"the file has no tensor {key}. It is incomplete.")
        shared[ours] = rest.pop(key).float()
    kind = config.changes
    endings = {f".{theirs}": parameter for parameter, theirs in kind.peft_names.items()}
    given: dict[str, dict[str, Tensor]] = {}
    for key, tensor in rest.items():
        ending = next((ending for ending in endings if key.endswith(ending)), None)
        module = "" if ending is None else key.removeprefix(_PREFIX).removesuffix(ending)
        if ending is None or not key.startswith(_PREFIX):
            raise ConfigError(
                f"tensor {shown(key)} is no part of a {config.name} adapter, whose tensors end in "
                f"{', '.join(endings)}."
            )
        if module not in modules:
            raise ConfigError(
                f"tensor {shown(key)} changes {shown(module)}, which this {model.config.family} model does not have, or "
                f"which adapters do not change.{suggestion(module, modules)} Changed can be: "
                f"{', '.join(sorted({found.rpartition('.')[2] for found in modules}))} of each block."
            )
        given.setdefault(module, {})[endings[ending]] = tensor
    changes: dict[str, Change] = {}
    for module, parameters in given.items():
        missing = kind.peft_names.keys() - parameters.keys()
        if missing:
            raise ConfigError(
                f"{shown(module)} has no {kind.peft_names[sorted(missing)[0]]} in the file. It is incomplete."
            )
        held = modules[module].parts
        total = sum(sites[site].matrix.outputs for site, _ in held)
        for site, rows in held:
            own = dict(parameters)
            if rows is not None:
                _check_fused(kind, module, parameters, total)
                own = {key: kind.rows_of(key, tensor, rows) for key, tensor in parameters.items()}
            changes[site] = config.restored(sites[site].matrix, own, shared)
    places = {site.rpartition(".")[2] for site in changes}
    config = replace(config, targets="+".join(place for place in PLACES if place in places) or "all")
    adapter = Adapter(config, model, changes, name)
    adapter.shared = shared
    return adapter


def _check_fused(kind: type[Change], module: str, parameters: Mapping[str, Tensor], total: int) -> None:
    for key, tensor in parameters.items():
        if key in kind.per_output and tensor.shape[0] != total:
            raise ConfigError(
                f"{kind.peft_names[key]} of {shown(module)} has {tensor.shape[0]} rows; the matrix has {total} outputs. "
                "The adapter belongs to another model."
            )
