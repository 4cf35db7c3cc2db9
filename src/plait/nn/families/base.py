"""What a model family is: a reading of its configuration, and the names its files use.

To add one: one file in `plait/nn/families/` that makes a `Family`, and one entry in that folder's
`__init__.py`. Files of both kinds (Hugging Face folders and GGUF) are read through one configuration:
GGUF metadata is first put into the words of a Hugging Face `config.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.errors import ModelFileError
from plait.nn.config import TransformerConfig
from plait.nn.parameters import Entry

__all__ = ["Family", "Names", "Settings", "expand", "from_gguf_metadata", "interleaved_rows"]

Names = dict[str, str | Entry]


class Settings(dict[str, Any]):
    """The entries of a `config.json`, with errors that name what is missing."""

    def need(self, key: str) -> Any:
        """The value of a setting that has no default.

        Raises:
            ModelFileError: it is absent.
        """
        if self.get(key) is None:
            raise ModelFileError(
                f"The model's configuration has no {key!r}. The file is incomplete or of another kind."
            )
        return self[key]

    def first(self, *keys: str, default: Any = None) -> Any:
        """The first of these settings that is present and not null."""
        return next((self[key] for key in keys if self.get(key) is not None), default)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family.

    Args:
        name: such as `llama`.
        model_types: values of `model_type` in a `config.json`.
        architectures: values of `general.architecture` in GGUF metadata.
        config: from settings to the model as data.
        names: from a configuration to where a Hugging Face checkpoint keeps each parameter.
        gguf_names: the same for GGUF.
        gguf_settings: corrections to the settings read from GGUF metadata.
    """

    name: str
    model_types: tuple[str, ...]
    config: Callable[[Settings], TransformerConfig]
    names: Callable[[TransformerConfig], dict[str, Entry]]
    architectures: tuple[str, ...] = ()
    gguf_names: Callable[[TransformerConfig], dict[str, Entry]] | None = None
    gguf_settings: Callable[[Settings, Mapping[str, Any]], Settings] = lambda settings, _: settings


def expand(names: Mapping[str, str | Entry], num_blocks: int) -> dict[str, Entry]:
    """Write out a table of names for every block.

    Args:
        names: from our name to the file's; `{i}` on both sides stands for the block's number.
    """
    entries: dict[str, Entry] = {}
    for ours, theirs in names.items():
        entry = theirs if isinstance(theirs, Entry) else Entry(theirs)
        for i in range(num_blocks) if "{i}" in ours else [0]:
            entries[ours.format(i=i)] = entry._replace(name=entry.name.format(i=i))
    return entries


def interleaved_rows(head_dim: int) -> Callable[[int], Tensor]:
    """How to put rows that pair channels (2c, 2c + 1) into the order that pairs (c, c + head_dim / 2)."""

    def index(num_rows: int) -> Tensor:
        return torch.arange(num_rows).view(-1, head_dim // 2, 2).transpose(1, 2).reshape(-1)

    return index


# From a setting of a config.json to the GGUF key (below the architecture's name) that holds it.
_GGUF_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "norm_epsilon": "attention.layer_norm_epsilon",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def from_gguf_metadata(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> Settings:
    """GGUF metadata in the words of a `config.json`.

    Args:
        metadata: the file's key/value pairs.
        tensors: tensors by name, for what only their presence tells.
    """
    architecture = metadata.get("general.architecture")
    settings = Settings(model_type=architecture)
    for setting, key in _GGUF_KEYS.items():
        value = metadata.get(f"{architecture}.{key}")
        if value is not None:
            settings[setting] = value
    embedding = tensors.get("token_embd.weight")
    if embedding is not None:
        settings["vocab_size"] = embedding.shape[0]
    settings["tie_word_embeddings"] = "output.weight" not in tensors
    return settings
