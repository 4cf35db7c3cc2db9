"""Qwen 2, 2.5 and 3 (dense): Llama with biases on queries, keys and values, or with normalised heads."""

from __future__ import annotations

from collections.abc import Collection

from plait.errors import ConfigError
from plait.nn.config import TransformerConfig
from plait.nn.families.base import Family, Names, expand, layer_windows
from plait.nn.families.llama import LLAMA_GGUF_NAMES, LLAMA_NAMES, llama_like
from plait.nn.families.settings import Settings

__all__ = ["QWEN2", "QWEN3", "QWEN3_GGUF_NAMES", "QWEN3_NAMES"]

QWEN3_NAMES: Names = LLAMA_NAMES | {
    "blocks.{i}.mixer.query_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
    "blocks.{i}.mixer.key_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
}

QWEN3_GGUF_NAMES: Names = LLAMA_GGUF_NAMES | {
    "blocks.{i}.mixer.query_norm.weight": "blk.{i}.attn_q_norm.weight",
    "blocks.{i}.mixer.key_norm.weight": "blk.{i}.attn_k_norm.weight",
}


def qwen2_config(settings: Settings) -> TransformerConfig:
    """Read a Qwen 2 configuration. Queries, keys and values have biases whatever `attention_bias` says."""
    settings.get("attention_bias")
    return llama_like(settings, "qwen2", windows=_windows(settings), max_positions=32768, qkv_bias=True)


def qwen3_config(settings: Settings) -> TransformerConfig:
    """Read a Qwen 3 configuration."""
    settings.assume(head_dim=128)
    bias = settings.flag("attention_bias", default=False)
    return llama_like(
        settings,
        "qwen3",
        windows=_windows(settings),
        max_positions=32768,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )


def _windows(settings: Settings) -> list[int | None]:
    """A window on the blocks from `max_window_layers` on, if `use_sliding_window`."""
    settings.assume(sliding_window=4096)
    window = settings.optional_count("sliding_window")
    first = settings.count("max_window_layers", default=28, least=0)
    used = settings.flag("use_sliding_window", default=False)
    return layer_windows(settings, window if used else None, lambda i: i >= first)


def _gguf_settings(settings: Settings, tensors: Collection[str]) -> None:
    """GGUF names a window only where it is used, and must then say in which blocks."""
    window = settings.optional_count("sliding_window")
    settings.assume(
        sliding_window=None,
        use_sliding_window=window is not None,
        attention_bias="blk.0.attn_q.bias" in tensors,
    )
    if window is not None and settings.get("layer_types") is None:
        raise ConfigError("the file has a sliding window but does not say which blocks use it.")


QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    architectures=("qwen2",),
    config=qwen2_config,
    names=lambda model: expand(LLAMA_NAMES, len(model.blocks)),
    gguf_settings=_gguf_settings,
    gguf_names=lambda model: expand(LLAMA_GGUF_NAMES, len(model.blocks)),
)

QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    architectures=("qwen3",),
    config=qwen3_config,
    names=lambda model: expand(QWEN3_NAMES, len(model.blocks)),
    gguf_settings=_gguf_settings,
    gguf_names=lambda model: expand(QWEN3_GGUF_NAMES, len(model.blocks)),
)
