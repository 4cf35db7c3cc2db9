"""From an open checkpoint to a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch

from plait.errors import ConfigError, ModelFileError, suggestion
from plait.nn.checkpoints.base import Checkpoint
from plait.nn.checkpoints.packed import PackedCheckpoint
from plait.nn.config import BlockConfig, TransformerConfig
from plait.nn.elastic import ElasticWeights, open_stack
from plait.nn.families import FAMILIES, Family, Settings, from_gguf
from plait.nn.families.settings import shown_value
from plait.nn.mixers import AttentionConfig
from plait.nn.parameters import CheckpointParameters, Entry
from plait.nn.transformer import Transformer
from plait.weights import Elastic, WeightFormat

__all__ = ["Description", "describe", "has_other_head", "load_transformer"]

# The families' smallest blocks, those of Phi-3 and of OPT without biases, are made of six tensors.
_TENSORS_OF_A_BLOCK = 6


class Description(NamedTuple):
    """What a checkpoint holds: its family, its configuration, and where each parameter is."""

    family: Family
    config: TransformerConfig
    entries: dict[str, Entry]


def describe(checkpoint: Checkpoint) -> Description:
    """Read a checkpoint's configuration, without its parameters.

    Raises:
        ModelFileError: the architecture is unknown, or the configuration is incomplete, of the wrong
            kind, or asks for something that is not implemented.
    """
    if isinstance(checkpoint, PackedCheckpoint):
        return _describe_packed(checkpoint)
    is_gguf = "general.architecture" in checkpoint.metadata
    max_blocks = len(checkpoint.tensors()) // _TENSORS_OF_A_BLOCK
    try:
        family = _family(checkpoint, is_gguf)
        if is_gguf:
            settings = from_gguf(checkpoint, max_blocks)
            family.gguf_settings(settings, checkpoint.tensors().keys())
        else:
            settings = Settings(checkpoint.metadata, max_blocks)
        config = family.config(settings)
        settings.check_unread()
    except ConfigError as error:
        raise ModelFileError(f"{checkpoint.path}: {error}") from error
    if is_gguf:
        assert family.gguf_names is not None
        return Description(family, config, family.gguf_names(config))
    entries = family.names(config)
    if not any(name.startswith(family.prefix) for name in checkpoint.tensors()):
        entries = {
            ours: entry._replace(name=entry.name.removeprefix(family.prefix))
            for ours, entry in entries.items()
        }
    return Description(family, config, entries)


def load_transformer(
    checkpoint: Checkpoint, format: WeightFormat | None, *, angles: Literal["fp64", "fp32"] = "fp64"
) -> Transformer:
    """Build the model that a checkpoint describes, for inference.

    Args:
        checkpoint: an open checkpoint.
        format: how matrices are stored in memory; None keeps each as it is in the file. An `Elastic` one says how much
            of a stack is read, all of it when left out.
        angles: precision of rotary angles in every layer; see `RopeConfig`.

    Raises:
        ConfigError: an `Elastic` format, and a checkpoint without a stack.
        ModelFileError: unknown architecture, missing or superfluous tensors, or shapes that do not match.
    """
    family, config, entries = describe(checkpoint)
    with torch.no_grad():
        if config.tied_head and has_other_head(checkpoint, entries):
            config = replace(config, tied_head=False)
        elastic = None
        if isinstance(format, Elastic) or format is None:
            elastic = _opened_stack(checkpoint, format)
            format = None
        blocks = tuple(_with_angles(block, angles) for block in config.blocks)
        parameters = CheckpointParameters(checkpoint, entries, format)
        try:
            model = Transformer(replace(config, blocks=blocks), parameters).eval()
        except ConfigError as error:
            # A file in our own words is not checked by a family; what does not fit comes out here.
            if format is None and isinstance(checkpoint, PackedCheckpoint):
                raise ModelFileError(f"{checkpoint.path}: {error}") from error
            raise
    _check_unused(checkpoint, family, parameters, entries["head.weight"].name)
    model.elastic = elastic
    return model


def _opened_stack(checkpoint: Checkpoint, format: Elastic | None) -> ElasticWeights | None:
    """As much of the checkpoint's stack as is asked for; None where it has none and none is asked for."""
    if isinstance(checkpoint, PackedCheckpoint) and checkpoint.order is not None:
        return open_stack(checkpoint, format)
    if format is not None:
        raise ConfigError(
            f"{format} reads part of a stack, and {checkpoint.path} holds none. Make one with "
            f"plait quantize --format {format.name}, and load that."
        )
    return None


def _describe_packed(checkpoint: PackedCheckpoint) -> Description:
    """A model that Plait wrote: its configuration is in our words, and its names are ours."""
    try:
        config = TransformerConfig.from_json(checkpoint.config)
    # A configuration that is nested like no other may be of any kind.
    except (ConfigError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{checkpoint.path}: its configuration is damaged: {error}") from error
    families = {family.name: family for family in FAMILIES}
    if config.family not in families:
        raise ModelFileError(f"{checkpoint.path}: unknown family {shown_value(config.family)}.")
    entries = {name: Entry(name) for name in checkpoint.tensors()}
    entries.setdefault("head.weight", Entry("head.weight"))
    entries.setdefault("embedding.weight", Entry("embedding.weight"))
    return Description(families[config.family], config, entries)


def _family(checkpoint: Checkpoint, is_gguf: bool) -> Family:
    key = "general.architecture" if is_gguf else "model_type"
    kind = checkpoint.metadata.get(key)
    known = {
        kind: family
        for family in FAMILIES
        for kind in (family.architectures if is_gguf else family.model_types)
    }
    if not isinstance(kind, str) or kind not in known:
        near = suggestion(kind, known) if isinstance(kind, str) else ""
        raise ConfigError(f"unknown {key} {shown_value(kind)}.{near} Known: {', '.join(sorted(known))}.")
    return known[kind]


def has_other_head(checkpoint: Checkpoint, entries: dict[str, Entry]) -> bool:
    """Whether the file has a head that differs from the embedding, though its configuration ties them."""
    head, embedding = entries["head.weight"].name, entries["embedding.weight"].name
    if not {head, embedding} <= checkpoint.tensors().keys():
        return False
    return not torch.equal(checkpoint.load(head), checkpoint.load(embedding))


def _with_angles(block: BlockConfig, angles: Literal["fp64", "fp32"]) -> BlockConfig:
    mixer = block.mixer
    if not isinstance(mixer, AttentionConfig) or mixer.rope is None or mixer.rope.angles == angles:
        return block
    return replace(block, mixer=replace(mixer, rope=replace(mixer.rope, angles=angles)))


def _check_unused(
    checkpoint: Checkpoint, family: Family, parameters: CheckpointParameters, head: str
) -> None:
    """Make sure that the model uses every parameter of the file."""
    # A tied head may be written out, and divisors of rotary speeds are part of the configuration.
    known = {head, "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
    unused = [name for name in parameters.unused() if name not in known and not name.endswith(family.ignored)]
    if unused:
        raise ModelFileError(
            f"{checkpoint.path}: tensor {shown_value(unused[0])} has no place in a {family.name} model of this"
            f" configuration ({len(unused)} such tensors). The file does not match its configuration."
        )
