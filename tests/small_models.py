"""Small random models that tests of several rooms use."""

from __future__ import annotations

from typing import Any

from plait.nn import (
    BlockConfig,
    FeedForwardConfig,
    MixerConfig,
    NormConfig,
    RandomParameters,
    Transformer,
    TransformerConfig,
)
from plait.weights import WeightFormat

__all__ = ["small_transformer"]


def small_transformer(
    *mixers: MixerConfig,
    seed: int,
    vocab_size: int,
    width: int,
    inner: int,
    max_positions: int,
    format: WeightFormat | None = None,
    **settings: Any,
) -> Transformer:
    """A model with one block for each mixer; `settings` are further fields of `TransformerConfig`.

    Its matrices are trainable fp32, or packed in the given format.
    """
    config = TransformerConfig(
        family="llama",
        vocab_size=vocab_size,
        width=width,
        blocks=tuple(
            BlockConfig(mixer=mixer, feed_forward=FeedForwardConfig(size=inner)) for mixer in mixers
        ),
        norm=NormConfig(),
        max_positions=max_positions,
        **settings,
    )
    return Transformer(config, RandomParameters(seed, format)).eval()
