"""OPT: learned positions counted from 2, and in its 350M size norms after each part and narrow embeddings."""

from __future__ import annotations

from plait.nn.config import FeedForwardConfig, NormConfig, TransformerConfig
from plait.nn.families.base import ACTIVATIONS, Family, Names, attention, decoder, expand, projections
from plait.nn.families.settings import Settings
from plait.nn.parameters import Entry

__all__ = ["OPT"]

# Position p is row p + 2 of the table: two rows once stood for padding.
_SHIFT = 2

_NAMES: Names = {
    "embedding.weight": "model.decoder.embed_tokens.weight",
    "positions.weight": "model.decoder.embed_positions.weight",
    "head.weight": "lm_head.weight",
    "project_in.weight": "model.decoder.project_in.weight",
    "project_out.weight": "model.decoder.project_out.weight",
    **projections("{part}", "model.decoder.{part}", {"norm": "final_layer_norm"}),
    **projections(
        "blocks.{i}.mixer.{part}",
        "model.decoder.layers.{i}.self_attn.{part}_proj",
        {"query": "q", "key": "k", "value": "v", "output": "out"},
    ),
    **projections(
        "blocks.{i}.feed_forward.{part}", "model.decoder.layers.{i}.{part}", {"up": "fc1", "down": "fc2"}
    ),
}


def config(settings: Settings) -> TransformerConfig:
    """Read an OPT configuration."""
    bias = settings.flag("enable_bias", default=True)
    affine = settings.flag("layer_norm_elementwise_affine", default=True)
    before = settings.flag("do_layer_norm_before", default=True)
    width = settings.count("hidden_size")
    inner = settings.count("word_embed_proj_dim", default=width)
    positions = settings.count("max_position_embeddings", default=2048)
    return decoder(
        settings,
        "opt",
        mixers=[attention(settings, qkv_bias=bias, output_bias=bias)] * settings.num_blocks(),
        feed_forward=FeedForwardConfig(
            size=settings.count("ffn_dim"),
            activation=settings.choice("activation_function", default="relu", choices=ACTIVATIONS),
            gated=False,
            bias=bias,
        ),
        norm=NormConfig(kind="layer", epsilon=1e-5, has_weight=affine, has_bias=affine),
        norms="pre" if before else "post",
        max_positions=positions,
        learned_positions=positions + _SHIFT,
        position_shift=_SHIFT,
        embedding_width=None if inner == width else inner,
        final_norm=before and not settings.flag("_remove_final_layer_norm", default=False),
        tied=True,
    )


def _names(model: TransformerConfig) -> dict[str, Entry]:
    place = "output_norm" if model.blocks[0].norms == "post" else "norm"
    norms = projections(
        "blocks.{i}.{part}",
        "model.decoder.layers.{i}.{part}",
        {f"mixer_{place}": "self_attn_layer_norm", f"feed_forward_{place}": "final_layer_norm"},
    )
    return expand(_NAMES | norms, len(model.blocks))


OPT = Family(name="opt", model_types=("opt",), config=config, names=_names)
