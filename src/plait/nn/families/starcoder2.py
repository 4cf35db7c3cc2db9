"""StarCoder2: layer norms, biases everywhere, a plain feed-forward, rotary positions and a window."""

from __future__ import annotations

from collections.abc import Collection

from plait.nn.config import FeedForwardConfig, NormConfig, TransformerConfig
from plait.nn.families.base import (
    ACTIVATIONS,
    Family,
    Names,
    attention,
    decoder,
    expand,
    layer_windows,
    projections,
    rope_config,
)
from plait.nn.families.llama import LLAMA_GGUF_NAMES, LLAMA_NAMES
from plait.nn.families.settings import Settings

__all__ = ["STARCODER2"]

_NAMES: Names = {
    **LLAMA_NAMES,
    "norm.bias": "model.norm.bias",
    "blocks.{i}.mixer_norm.bias": "model.layers.{i}.input_layernorm.bias",
    "blocks.{i}.feed_forward_norm.bias": "model.layers.{i}.post_attention_layernorm.bias",
    **projections(
        "blocks.{i}.feed_forward.{part}", "model.layers.{i}.mlp.{part}", {"up": "c_fc", "down": "c_proj"}
    ),
}

_GGUF_NAMES: Names = {
    **LLAMA_GGUF_NAMES,
    "norm.bias": "output_norm.bias",
    "blocks.{i}.mixer_norm.bias": "blk.{i}.attn_norm.bias",
    "blocks.{i}.feed_forward_norm.bias": "blk.{i}.ffn_norm.bias",
}


def config(settings: Settings) -> TransformerConfig:
    """Read a StarCoder2 configuration. A GGUF file that does not name a window has none."""
    bias = settings.flag("use_bias", default=True)
    rope = rope_config(settings, attention(settings).head_dim, max_positions=4096)
    return decoder(
        settings,
        "starcoder2",
        mixers=[
            attention(settings, rope=rope, window=window, qkv_bias=bias, output_bias=bias)
            for window in layer_windows(settings, settings.optional_count("sliding_window"))
        ],
        feed_forward=FeedForwardConfig(
            size=settings.count("intermediate_size"),
            activation=settings.choice("hidden_act", default="gelu_pytorch_tanh", choices=ACTIVATIONS),
            gated=False,
            bias=bias,
        ),
        norm=NormConfig(kind="layer", epsilon=settings.number("norm_epsilon", default=1e-5)),
        max_positions=4096,
        tied=True,
    )


def _gguf_settings(settings: Settings, tensors: Collection[str]) -> None:
    settings.assume(use_bias="blk.0.attn_q.bias" in tensors)


STARCODER2 = Family(
    name="starcoder2",
    model_types=("starcoder2",),
    architectures=("starcoder2",),
    config=config,
    names=lambda model: expand(_NAMES, len(model.blocks)),
    gguf_names=lambda model: expand(_GGUF_NAMES, len(model.blocks)),
    gguf_settings=_gguf_settings,
)
