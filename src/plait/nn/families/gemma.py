"""Gemma 2 and 3 (text): norms before and after each part, local and global blocks, scaled embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

from plait.nn.config import FeedForwardConfig, NormConfig, TransformerConfig
from plait.nn.families.base import (
    ACTIVATIONS,
    Family,
    Names,
    attention,
    decoder,
    expand,
    layer_windows,
    rope_config,
)
from plait.nn.families.llama import LLAMA_GGUF_NAMES, LLAMA_NAMES
from plait.nn.families.qwen import QWEN3_GGUF_NAMES, QWEN3_NAMES
from plait.nn.families.settings import Settings
from plait.nn.mixers import AttentionConfig
from plait.nn.parameters import Entry
from plait.nn.rotary import RopeConfig

__all__ = ["GEMMA2", "GEMMA3"]

_SANDWICH: Names = {
    "blocks.{i}.mixer_output_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blocks.{i}.feed_forward_norm.weight": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "blocks.{i}.feed_forward_output_norm.weight": "model.layers.{i}.post_feedforward_layernorm.weight",
}
_GGUF_SANDWICH: Names = {
    "blocks.{i}.mixer_output_norm.weight": "blk.{i}.post_attention_norm.weight",
    "blocks.{i}.feed_forward_output_norm.weight": "blk.{i}.post_ffw_norm.weight",
}


def gemma2_config(settings: Settings) -> TransformerConfig:
    """Read a Gemma 2 configuration: every other block is local, the first among them."""
    settings.assume(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    windows = _windows(settings, period=2)
    softcap = settings.optional_number("attn_logit_softcapping")
    rope = rope_config(settings, _head_dim(settings), max_positions=8192)
    mixers = [_attention(settings, rope=rope, window=window, softcap=softcap) for window in windows]
    return _gemma(settings, "gemma2", mixers, max_positions=8192)


def gemma3_config(settings: Settings) -> TransformerConfig:
    """Read a Gemma 3 text configuration: every sixth block is global and has rotary positions of its own."""
    windows = _windows(settings, period=6)
    head_dim, longest = _head_dim(settings), 131_072
    everywhere = rope_config(
        settings, head_dim, max_positions=longest, layer_type="full_attention", theta=1_000_000.0
    )
    nearby = _local_rope(settings, head_dim, longest)
    mixers = [
        _attention(settings, rope=everywhere if window is None else nearby, window=window, qk_norm=True)
        for window in windows
    ]
    return _gemma(settings, "gemma3", mixers, max_positions=longest)


def _local_rope(settings: Settings, head_dim: int, longest: int) -> RopeConfig:
    """The rotary positions of local blocks; a scaling that is not given by layer type is not theirs."""
    theta_key = "rope_local_base_freq"
    given = settings.get("rope_scaling", "rope_parameters")
    if isinstance(given, Mapping) and "sliding_attention" in given:
        return rope_config(
            settings,
            head_dim,
            max_positions=longest,
            layer_type="sliding_attention",
            theta_key=theta_key,
        )
    return RopeConfig(theta=settings.number(theta_key, default=10000.0), dim=head_dim)


def _windows(settings: Settings, period: int) -> list[int | None]:
    settings.assume(sliding_window=4096)
    period = settings.count("sliding_window_pattern", default=period)
    return layer_windows(settings, settings.optional_count("sliding_window"), lambda i: (i + 1) % period != 0)


def _head_dim(settings: Settings) -> int:
    settings.assume(head_dim=256)
    return settings.count("head_dim")


def _attention(
    settings: Settings,
    *,
    rope: RopeConfig,
    window: int | None,
    softcap: float | None = None,
    qk_norm: bool = False,
) -> AttentionConfig:
    bias = settings.flag("attention_bias", default=False)
    return attention(
        settings,
        rope=rope,
        window=window,
        softcap=softcap,
        qk_norm=qk_norm,
        scale=settings.number("query_pre_attn_scalar", default=256) ** -0.5,
        qkv_bias=bias,
        output_bias=bias,
    )


def _gemma(
    settings: Settings, family: str, mixers: list[AttentionConfig], *, max_positions: int
) -> TransformerConfig:
    activation = settings.choice("hidden_activation", default="gelu_pytorch_tanh", choices=ACTIVATIONS)
    return decoder(
        settings,
        family,
        mixers=mixers,
        feed_forward=FeedForwardConfig(size=settings.count("intermediate_size"), activation=activation),
        norm=NormConfig(kind="rms", epsilon=settings.number("rms_norm_eps", default=1e-6)),
        norms="sandwich",
        max_positions=max_positions,
        tied=True,
        embedding_scale=math.sqrt(settings.count("hidden_size")),
        logit_softcap=settings.optional_number("final_logit_softcapping"),
    )


def _names(names: Names, model: TransformerConfig) -> dict[str, Entry]:
    """Hugging Face files hold norm weights less 1."""
    return {
        ours: entry._replace(plus=1.0) if ours.endswith("norm.weight") else entry
        for ours, entry in expand(names, len(model.blocks)).items()
    }


def _gguf_settings(largest: int) -> Callable[[Settings, Collection[str]], None]:
    """GGUF does not say by what queries are scaled: by the head's size, and in the largest model of each
    generation, known by its number of blocks, by width / heads."""

    def complete(settings: Settings, tensors: Collection[str]) -> None:
        scalar = settings.count("head_dim")
        if settings.num_blocks() == largest:
            scalar = settings.count("hidden_size") // settings.count("num_attention_heads")
        settings.assume(query_pre_attn_scalar=scalar)

    return complete


GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    architectures=("gemma2",),
    config=gemma2_config,
    names=lambda model: _names(LLAMA_NAMES | _SANDWICH, model),
    gguf_names=lambda model: expand(LLAMA_GGUF_NAMES | _GGUF_SANDWICH, len(model.blocks)),
    gguf_settings=_gguf_settings(largest=46),
)

GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    architectures=("gemma3",),
    config=gemma3_config,
    names=lambda model: _names(QWEN3_NAMES | _SANDWICH, model),
    gguf_names=lambda model: expand(QWEN3_GGUF_NAMES | _GGUF_SANDWICH, len(model.blocks)),
    gguf_settings=_gguf_settings(largest=62),
)
