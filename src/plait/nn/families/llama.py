"""Llama 2 and 3, Mistral, and the many models of their shape (SmolLM2 among them)."""

from __future__ import annotations

from plait.nn.config import BlockConfig, FeedForwardConfig, NormConfig, TransformerConfig
from plait.nn.families.base import Family, Names, Settings, expand, interleaved_rows
from plait.nn.mixers import AttentionConfig
from plait.nn.parameters import Entry
from plait.nn.rotary import RopeConfig

__all__ = ["LLAMA", "LLAMA_GGUF_NAMES", "LLAMA_NAMES"]

LLAMA_NAMES: Names = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "blocks.{i}.mixer_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "blocks.{i}.feed_forward_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    **{
        f"blocks.{{i}}.mixer.{ours}.{kind}": f"model.layers.{{i}}.self_attn.{theirs}_proj.{kind}"
        for ours, theirs in {"query": "q", "key": "k", "value": "v", "output": "o"}.items()
        for kind in ("weight", "bias")
    },
    **{
        f"blocks.{{i}}.feed_forward.{part}.{kind}": f"model.layers.{{i}}.mlp.{part}_proj.{kind}"
        for part in ("gate", "up", "down")
        for kind in ("weight", "bias")
    },
}

LLAMA_GGUF_NAMES: Names = {
    "embedding.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
    "blocks.{i}.mixer_norm.weight": "blk.{i}.attn_norm.weight",
    "blocks.{i}.feed_forward_norm.weight": "blk.{i}.ffn_norm.weight",
    **{
        f"blocks.{{i}}.mixer.{ours}.{kind}": f"blk.{{i}}.attn_{theirs}.{kind}"
        for ours, theirs in {"query": "q", "key": "k", "value": "v", "output": "output"}.items()
        for kind in ("weight", "bias")
    },
    **{
        f"blocks.{{i}}.feed_forward.{part}.{kind}": f"blk.{{i}}.ffn_{part}.{kind}"
        for part in ("gate", "up", "down")
        for kind in ("weight", "bias")
    },
}


def config(settings: Settings) -> TransformerConfig:
    """Read a Llama or Mistral configuration."""
    width, heads = settings.need("hidden_size"), settings.need("num_attention_heads")
    head_dim = settings.first("head_dim", default=width // heads)
    bias = bool(settings.get("attention_bias", False))
    block = BlockConfig(
        mixer=AttentionConfig(
            num_heads=heads,
            num_kv_heads=settings.first("num_key_value_heads", default=heads),
            head_dim=head_dim,
            rope=RopeConfig(theta=float(settings.first("rope_theta", default=10000.0)), dim=head_dim),
            window=settings.get("sliding_window"),
            qkv_bias=bias,
            output_bias=bias,
        ),
        feed_forward=FeedForwardConfig(
            size=settings.need("intermediate_size"), bias=bool(settings.get("mlp_bias", False))
        ),
    )
    return TransformerConfig(
        family="llama",
        vocab_size=settings.need("vocab_size"),
        width=width,
        blocks=(block,) * settings.need("num_hidden_layers"),
        norm=NormConfig(kind="rms", epsilon=float(settings.first("rms_norm_eps", default=1e-6))),
        max_positions=settings.first("max_position_embeddings", default=2048),
        tied_head=bool(settings.get("tie_word_embeddings", False)),
    )


def gguf_names(model: TransformerConfig) -> dict[str, Entry]:
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


LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral"),
    architectures=("llama",),
    config=config,
    names=lambda model: expand(LLAMA_NAMES, len(model.blocks)),
    gguf_names=gguf_names,
)
