"""GPT-2: learned positions, layer norms with biases, and weights stored as (inputs, outputs)."""

from __future__ import annotations

from plait.nn.config import FeedForwardConfig, NormConfig, TransformerConfig
from plait.nn.families.base import (
    ACTIVATIONS,
    Family,
    Names,
    attention,
    decoder,
    expand,
    projections,
    stacked_rows,
)
from plait.nn.families.settings import Settings
from plait.nn.parameters import Entry

__all__ = ["GPT2"]

_NAMES: Names = {
    "embedding.weight": "transformer.wte.weight",
    "positions.weight": "transformer.wpe.weight",
    "head.weight": "lm_head.weight",
    **projections("{part}", "transformer.{part}", {"norm": "ln_f"}),
    **projections(
        "blocks.{i}.{part}",
        "transformer.h.{i}.{part}",
        {"mixer_norm": "ln_1", "feed_forward_norm": "ln_2"},
    ),
    **projections(
        "blocks.{i}.{part}",
        "transformer.h.{i}.{part}",
        {"mixer.output": "attn.c_proj", "feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"},
    ),
}

_GGUF_NAMES: Names = {
    "embedding.weight": "token_embd.weight",
    "positions.weight": "position_embd.weight",
    "head.weight": "output.weight",
    **projections("{part}", "{part}", {"norm": "output_norm"}),
    **projections(
        "blocks.{i}.{part}",
        "blk.{i}.{part}",
        {
            "mixer_norm": "attn_norm",
            "feed_forward_norm": "ffn_norm",
            "mixer.output": "attn_output",
            "feed_forward.up": "ffn_up",
            "feed_forward.down": "ffn_down",
        },
    ),
}


def config(settings: Settings) -> TransformerConfig:
    """Read a GPT-2 configuration."""
    width = settings.count("n_embd", "hidden_size")
    num_blocks = settings.num_blocks("n_layer", "num_hidden_layers")
    plain = attention(settings)
    scale = plain.head_dim**-0.5 if settings.flag("scale_attn_weights", default=True) else 1.0
    by_depth = settings.flag("scale_attn_by_inverse_layer_idx", default=False)
    positions = settings.count("n_positions", "max_position_embeddings", default=1024)
    return decoder(
        settings,
        "gpt2",
        mixers=[
            attention(settings, scale=scale / (i + 1 if by_depth else 1), qkv_bias=True, output_bias=True)
            for i in range(num_blocks)
        ],
        feed_forward=FeedForwardConfig(
            size=settings.count("n_inner", "intermediate_size", default=4 * width),
            activation=settings.choice("activation_function", default="gelu_new", choices=ACTIVATIONS),
            gated=False,
            bias=True,
        ),
        norm=NormConfig(
            kind="layer", epsilon=settings.number("layer_norm_epsilon", "norm_epsilon", default=1e-5)
        ),
        max_positions=positions,
        learned_positions=positions,
        tied=True,
    )


def _names(model: TransformerConfig) -> dict[str, Entry]:
    entries = expand(_NAMES, len(model.blocks))
    for name, entry in entries.items():
        if name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name:
            entries[name] = entry._replace(transposed=True)
    return entries | _stacked(model, "transformer.h.{i}.attn.c_attn", transposed=True)


def _gguf_names(model: TransformerConfig) -> dict[str, Entry]:
    """GGUF files hold matrices the usual way round."""
    return expand(_GGUF_NAMES, len(model.blocks)) | _stacked(model, "blk.{i}.attn_qkv", transposed=False)


def _stacked(model: TransformerConfig, theirs: str, *, transposed: bool) -> dict[str, Entry]:
    """Query, key and value are one tensor of each block."""
    rows = {"query": model.width, "key": model.width, "value": model.width}
    entries: dict[str, Entry] = {}
    for i in range(len(model.blocks)):
        entries |= stacked_rows(f"blocks.{i}.mixer.{{part}}", theirs.format(i=i), rows, transposed=transposed)
    return entries


GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    architectures=("gpt2",),
    config=config,
    names=_names,
    gguf_names=_gguf_names,
    prefix="transformer.",
    # The causal mask, which early checkpoints keep as a tensor.
    ignored=(".attn.bias", ".attn.masked_bias"),
)
