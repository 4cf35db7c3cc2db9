"""Models: one config-driven transformer, its mixers, and the families and files it is read from."""

from __future__ import annotations

from plait.nn.adapter_files import inspect_adapter, load_adapter, save_adapter
from plait.nn.adapters import Adapter, new_adapter
from plait.nn.config import BlockConfig, FeedForwardConfig, MixerConfig, NormConfig, TransformerConfig
from plait.nn.elastic import ElasticWeights, Resized
from plait.nn.load import describe, load_transformer
from plait.nn.lowered import lower
from plait.nn.parameters import CheckpointParameters, Parameters, RandomParameters
from plait.nn.quantize import Quantized, quantize_checkpoint
from plait.nn.save import save_transformer
from plait.nn.transformer import Transformer
from plait.nn.tuned import Tuned, open_tuned, save_tuned

__all__ = [
    "Adapter",
    "BlockConfig",
    "CheckpointParameters",
    "ElasticWeights",
    "FeedForwardConfig",
    "MixerConfig",
    "NormConfig",
    "Parameters",
    "Quantized",
    "RandomParameters",
    "Resized",
    "Transformer",
    "TransformerConfig",
    "Tuned",
    "describe",
    "inspect_adapter",
    "load_adapter",
    "load_transformer",
    "lower",
    "new_adapter",
    "open_tuned",
    "quantize_checkpoint",
    "save_adapter",
    "save_transformer",
    "save_tuned",
]
