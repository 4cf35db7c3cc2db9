"""From an open checkpoint to a model."""

from __future__ import annotations

from typing import NamedTuple

import torch

from plait.errors import ModelFileError, suggestion
from plait.nn.checkpoints.base import Checkpoint
from plait.nn.config import TransformerConfig
from plait.nn.families import FAMILIES, Family, Settings, from_gguf_metadata
from plait.nn.parameters import CheckpointParameters, Entry
from plait.nn.transformer import Transformer
from plait.weights import WeightFormat

__all__ = ["Description", "describe", "load_transformer"]


class Description(NamedTuple):
    """What a checkpoint holds: its family, its configuration, and where each parameter is."""

    family: Family
    config: TransformerConfig
    entries: dict[str, Entry]


def describe(checkpoint: Checkpoint) -> Description:
    """Read a checkpoint's configuration, without its parameters.

    Raises:
        ModelFileError: the architecture is unknown, or the configuration is incomplete.
    """
    metadata = checkpoint.metadata
    is_gguf = "general.architecture" in metadata
    kind = metadata["general.architecture"] if is_gguf else metadata.get("model_type")
    for family in FAMILIES:
        kinds = family.architectures if is_gguf else family.model_types
        if kind in kinds:
            break
    else:
        known = sorted(
            {k for family in FAMILIES for k in (family.architectures if is_gguf else family.model_types)}
        )
        raise ModelFileError(
            f"{checkpoint.path}: unknown architecture {kind!r}.{suggestion(str(kind), known)}"
            f" Known: {', '.join(known)}."
        )
    if is_gguf:
        settings = family.gguf_settings(from_gguf_metadata(metadata, checkpoint.tensors()), metadata)
        config = family.config(settings)
        assert family.gguf_names is not None
        return Description(family, config, family.gguf_names(config))
    config = family.config(Settings(metadata))
    return Description(family, config, family.names(config))


def load_transformer(checkpoint: Checkpoint, format: WeightFormat | None) -> Transformer:
    """Build the model that a checkpoint describes, for inference.

    Args:
        checkpoint: an open checkpoint.
        format: how matrices are stored in memory; None keeps each as it is in the file.

    Raises:
        ModelFileError: unknown architecture, missing tensors, or shapes that do not match.
    """
    description = describe(checkpoint)
    with torch.no_grad():
        parameters = CheckpointParameters(checkpoint, description.entries, format)
        return Transformer(description.config, parameters).eval()
