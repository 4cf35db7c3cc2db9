"""Llama 2 and 3, Mistral, and the many models of their shape (SmolLM2 among them)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from plait.nn.config import FeedForwardConfig, NormConfig, TransformerConfig
from plait.nn.families.base import (
    ACTIVATIONS,
    Family,
    Names,
    attention,
    decoder,
    expand,
    interleaved_rows,
    layer_windows,
    projections,
    rope_config,
)
from plait.nn.families.settings import Settings
from plait.nn.mixers import AttentionConfig
from plait.nn.parameters import Entry

__all__ = ["LLAMA", "LLAMA_GGUF_NAMES", "LLAMA_NAMES", "llama_like"]

LLAMA_NAMES: Names = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "blocks.{i}.mixer_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "blocks.{i}.feed_forward_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    **projections(
        "blocks.{i}.mixer.{part}",
        "model.layers.{i}.self_attn.{part}_proj",
        {"query": "q", "key": "k", "value": "v", "output": "o"},
    ),
    **projections(
        "blocks.{i}.feed_forward.{part}",
        "model.layers.{i}.mlp.{part}_proj",
        {"gate": "gate", "up": "up", "down": "down"},
    ),
}

LLAMA_GGUF_NAMES: Names = {
    "embedding.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
    "blocks.{i}.mixer_norm.weight": "blk.{i}.attn_norm.weight",
    "blocks.{i}.feed_forward_norm.weight": "blk.{i}.ffn_norm.weight",
    **projections(
        "blocks.{i}.mixer.{part}",
        "blk.{i}.attn_{part}",
        {"query": "q", "key": "k", "value": "v", "output": "output"},
    ),
    **projections(
        "blocks.{i}.feed_forward.{part}",
        "blk.{i}.ffn_{part}",
        {"gate": "gate", "up": "up", "down": "down"},
    ),
}


def llama_like(
    settings: Settings,
    family: str,
    *,
    windows: list[int | None],
    max_positions: int,
    mlp_bias: bool = False,
    epsilon: float = 1e-6,
    **choices: Any,
) -> TransformerConfig:
    """A decoder of RMS norms, rotary attention and gated feed-forwards: Llama and its relatives.

    Args:
        windows: of each block.
        max_positions, epsilon: what the family assumes where the settings do not say.
        mlp_bias: whether the feed-forwards have biases.
        choices: further fields of `AttentionConfig`.
    """
    mixer = attention(settings, **choices)
    rope = rope_config(settings, mixer.head_dim, max_positions=max_positions)
    return decoder(
        settings,
        family,
        mixers=[attention(settings, rope=rope, window=window, **choices) for window in windows],
        feed_forward=FeedForwardConfig(
            size=settings.count("intermediate_size"),
            activation=settings.choice("hidden_act", default="silu", choices=ACTIVATIONS),
            bias=mlp_bias,
        ),
        norm=NormConfig(kind="rms", epsilon=settings.number("rms_norm_eps", default=epsilon)),
        max_positions=max_positions,
        tied=False,
    )


def config(settings: Settings) -> TransformerConfig:
    """Read a Llama or Mistral configuration; a Mistral without a word on its window has one of 4,096."""
    is_mistral = settings.get("model_type") == "mistral"
    if is_mistral:
        settings.assume(sliding_window=4096)
    bias = settings.flag("attention_bias", default=False)
    return llama_like(
        settings,
        "llama",
        windows=layer_windows(settings, settings.optional_count("sliding_window")),
        max_positions=4096 * 32 if is_mistral else 2048,
        mlp_bias=settings.flag("mlp_bias", default=False),
        qkv_bias=bias,
        output_bias=settings.flag("attention_output_bias", default=bias),
    )


def _gguf_settings(settings: Settings, tensors: Collection[str]) -> None:
    settings.assume(
        attention_bias="blk.0.attn_q.bias" in tensors,
        attention_output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
    )


def _gguf_names(model: TransformerConfig) -> dict[str, Entry]:
    """GGUF files of this family hold query and key rows with rotary pairs side by side."""
    entries = expand(LLAMA_GGUF_NAMES, len(model.blocks))
    for i, block in enumerate(model.blocks):
        assert isinstance(block.mixer, AttentionConfig)
        reorder = interleaved_rows(block.mixer.head_dim)
        for part in ("query", "key"):
            for kind in ("weight", "bias"):
                name = f"blocks.{i}.mixer.{part}.{kind}"
                entries[name] = entries[name]._replace(reorder=reorder)
    return entries


def _settings(model: TransformerConfig) -> dict[str, Any]:
    """What Transformers reads as a Llama; both forms of the rotary base, for its old and new versions."""
    block = model.blocks[0]
    mixer, feed_forward = block.mixer, block.feed_forward
    assert isinstance(mixer, AttentionConfig)
    theta = 10000.0 if mixer.rope is None else mixer.rope.theta
    placeholder = {} if model.placeholder is None else {"placeholder_token_id": model.placeholder}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": feed_forward.size,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": feed_forward.activation,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm.epsilon,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": model.tied_head,
        "attention_bias": mixer.qkv_bias,
        "mlp_bias": feed_forward.bias,
        **placeholder,
    }


LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral"),
    architectures=("llama",),
    config=config,
    names=lambda model: expand(LLAMA_NAMES, len(model.blocks)),
    gguf_names=_gguf_names,
    gguf_settings=_gguf_settings,
    settings=_settings,
)
