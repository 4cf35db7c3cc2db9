"""Models of our own that are no other family's: their `config.json` is the configuration itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.errors import ConfigError
from plait.nn.config import TransformerConfig
from plait.nn.families.base import Family, Names, expand
from plait.nn.families.settings import Settings, shown_value
from plait.nn.mixers import AttentionConfig

__all__ = ["PLAIT"]

_KEY = "transformer"
_NORMS = ("mixer_norm", "feed_forward_norm", "mixer_output_norm", "feed_forward_output_norm")
_MATRICES = ("query", "key", "value", "output")
_PARTS = [
    *(f"blocks.{{i}}.{part}" for part in _NORMS),
    *(f"blocks.{{i}}.mixer.{part}" for part in (*_MATRICES, "query_norm", "key_norm")),
    *(f"blocks.{{i}}.feed_forward.{part}" for part in ("gate", "up", "down")),
    *("embedding", "positions", "project_in", "project_out", "norm", "head"),
]
# Tensors are called as the architecture calls them.
NAMES: Names = {name: name for part in _PARTS for name in (f"{part}.weight", f"{part}.bias")}


def config(settings: Settings) -> TransformerConfig:
    """Read the configuration that is written out.

    Raises:
        ConfigError: it is absent or damaged, or has blocks without attention.
    """
    data = settings.get(_KEY)
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"the configuration sets {_KEY} to {shown_value(data)}. It must be a model as Plait writes it."
        )
    try:
        model = TransformerConfig.from_json({**data, "family": PLAIT.name})
    # A configuration that is nested like no other may be of any kind.
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"the configuration sets {_KEY} to no model: {error}.") from error
    if not all(isinstance(block.mixer, AttentionConfig) for block in model.blocks):
        raise ConfigError("the configuration has blocks without attention, of which no files are written.")
    return model


def _settings(model: TransformerConfig) -> dict[str, Any]:
    assert all(isinstance(block.mixer, AttentionConfig) for block in model.blocks)
    return {"architectures": ["PlaitTransformer"], "model_type": PLAIT.name, _KEY: model.to_json()}


PLAIT = Family(
    name="plait",
    model_types=("plait",),
    config=config,
    names=lambda model: expand(NAMES, len(model.blocks)),
    prefix="",
    settings=_settings,
)
