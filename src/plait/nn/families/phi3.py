"""Phi-3, 3.5 and 4 (dense): Llama with fused projections, partly rotated heads and LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping

from plait.nn.config import TransformerConfig
from plait.nn.families.base import Family, Names, expand, layer_windows, stacked_rows
from plait.nn.families.llama import LLAMA_GGUF_NAMES, LLAMA_NAMES, llama_like
from plait.nn.families.settings import Settings
from plait.nn.mixers import AttentionConfig
from plait.nn.parameters import Entry

__all__ = ["PHI3"]


def config(settings: Settings) -> TransformerConfig:
    """Read a Phi-3 configuration; early ones call LongRoPE `su` or `yarn`."""
    key = "rope_scaling" if settings.get("rope_scaling") else "rope_parameters"
    rope = settings.get(key)
    if isinstance(rope, Mapping):
        if rope.get("rope_type", rope.get("type")) in ("su", "yarn"):
            settings.set(key, {**rope, "rope_type": "longrope"})
        if rope.get("original_max_position_embeddings") is None:
            settings.assume(original_max_position_embeddings=4096)
    return llama_like(
        settings,
        "phi3",
        windows=layer_windows(settings, settings.optional_count("sliding_window")),
        max_positions=4096,
        epsilon=1e-5,
    )


def _names(table: Names, model: TransformerConfig, attention: str, feed_forward: str) -> dict[str, Entry]:
    """Query, key and value rows are one tensor of each block, and so are gate and up."""
    entries = expand(table, len(model.blocks))
    for i, block in enumerate(model.blocks):
        mixer = block.mixer
        assert isinstance(mixer, AttentionConfig)
        heads, kv_rows = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
        entries |= stacked_rows(
            f"blocks.{i}.mixer.{{part}}",
            attention.format(i=i),
            {"query": heads, "key": kv_rows, "value": kv_rows},
        )
        entries |= stacked_rows(
            f"blocks.{i}.feed_forward.{{part}}",
            feed_forward.format(i=i),
            {"gate": block.feed_forward.size, "up": block.feed_forward.size},
        )
    return entries


PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    architectures=("phi3",),
    config=config,
    names=lambda model: _names(
        LLAMA_NAMES, model, "model.layers.{i}.self_attn.qkv_proj", "model.layers.{i}.mlp.gate_up_proj"
    ),
    gguf_names=lambda model: _names(LLAMA_GGUF_NAMES, model, "blk.{i}.attn_qkv", "blk.{i}.ffn_up"),
)
