"""Small random models of every family, made by Transformers, and the same models loaded by Plait."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from plait.memory import MemoryPlan, Rows
from plait.nn import Transformer, load_transformer
from plait.nn.checkpoints.safetensors import SafetensorsCheckpoint
from plait.weights.ggml import FP32

VOCABULARY = 101


@dataclass(frozen=True)
class Case:
    """A model to make.

    Attributes:
        name: of the test.
        model_type: of the Transformers configuration.
        settings: of that configuration, where they differ from `_SIZES`.
        by_length: rotary speeds depend on the length, so that a text read piece by piece differs.
        prompt: tokens that greedy decoding starts from.
    """

    name: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    by_length: bool = False
    prompt: int = 5


class Pair(NamedTuple):
    """One model twice, and the folder that holds it."""

    case: Case
    theirs: PreTrainedModel
    ours: Transformer
    folder: Path


_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

_GEMMA: dict[str, Any] = {"head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 20}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_OPT: dict[str, Any] = {"ffn_dim": 48, "num_hidden_layers": 2}
_FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.0, 5.0, 9.0]}


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


def _gemma3_rope(**scaling: Any) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "full_attention": {"rope_theta": 50000.0, **scaling},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        }
    }


CASES = [
    Case("llama", "llama", {"num_key_value_heads": 4}),
    Case("llama-gqa-tied", "llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    Case("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    Case("llama-mqa-head-size", "llama", {"num_key_value_heads": 1, "head_dim": 14}),
    Case("llama-three-heads", "llama", {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1}),
    Case("llama-gelu", "llama", {"hidden_act": "gelu"}),
    Case("llama-theta", "llama", _rope("default", rope_theta=123.0)),
    Case("llama-linear", "llama", _rope("linear", factor=3.5)),
    Case("llama-dynamic", "llama", {"max_position_embeddings": 16} | _rope("dynamic", factor=2.0), True),
    Case("llama-yarn", "llama", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    Case(
        "llama-yarn-all",
        "llama",
        _rope(
            "yarn", factor=8.0, original_max_position_embeddings=32, beta_fast=8.0, beta_slow=2.0,
            mscale=0.7, mscale_all_dim=1.3, truncate=False,
        ),
    ),
    Case(
        "llama3",
        "llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
        | {"head_dim": 16},
    ),
    Case(
        "llama-longrope",
        "llama",
        _rope("longrope", **_FACTORS, original_max_position_embeddings=16),
        by_length=True,
        prompt=20,
    ),
    Case("mistral-window", "mistral", {"sliding_window": 8}),
    Case("mistral-no-window", "mistral", {"sliding_window": None, "head_dim": 6, "tie_word_embeddings": True}),
    Case("qwen2", "qwen2"),
    Case("qwen2-tied-mha", "qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    Case(
        "qwen2-window",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    Case(
        "qwen2-layer-types",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
        | _rope("yarn", factor=2.0, original_max_position_embeddings=32, attention_factor=1.25),
    ),
    Case("qwen3", "qwen3", {"head_dim": 16}),
    Case(
        "qwen3-biases-window",
        "qwen3",
        {
            "head_dim": 10,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 0,
            "num_key_value_heads": 1,
        },
    ),
    Case(
        "gemma2",
        "gemma2",
        _GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 7.0, "num_hidden_layers": 3},
    ),
    Case(
        "gemma2-no-caps",
        "gemma2",
        _GEMMA
        | {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "hidden_activation": "gelu",
            "num_key_value_heads": 4,
        },
    ),
    Case(
        "gemma3",
        "gemma3_text",
        _GEMMA
        | _gemma3_rope(rope_type="linear", factor=8.0)
        | {"num_hidden_layers": 7, "final_logit_softcapping": 9.0, "num_key_value_heads": 1},
    ),
    Case(
        "gemma3-yarn",
        "gemma3_text",
        _GEMMA
        | _gemma3_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
        | {"layer_types": ["full_attention", "sliding_attention"], "attention_bias": True},
    ),
    Case("gemma3-pattern", "gemma3_text", _GEMMA | {"sliding_window_pattern": 2, "num_hidden_layers": 4}),
    Case("phi3", "phi3"),
    Case("phi3-window", "phi3", {"sliding_window": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    Case("phi3-partial", "phi3", {"hidden_size": 64} | _rope("default", partial_rotary_factor=0.75)),
    Case(
        "phi3-longrope",
        "phi3",
        {"original_max_position_embeddings": 16} | _rope("longrope", **_FACTORS),
        by_length=True,
        prompt=20,
    ),
    Case("gpt2", "gpt2", _GPT2),
    Case(
        "gpt2-variants",
        "gpt2",
        _GPT2
        | {
            "n_inner": 40,
            "scale_attn_by_inverse_layer_idx": True,
            "activation_function": "relu",
            "tie_word_embeddings": False,
            "layer_norm_epsilon": 1e-3,
        },
    ),
    Case("gpt2-unscaled", "gpt2", _GPT2 | {"scale_attn_weights": False, "reorder_and_upcast_attn": True}),
    Case("starcoder2", "starcoder2", {"sliding_window": 8}),
    Case(
        "starcoder2-no-biases",
        "starcoder2",
        {
            "use_bias": False,
            "num_key_value_heads": 1,
            "tie_word_embeddings": False,
            "hidden_act": "gelu",
            "norm_epsilon": 1e-3,
        },
    ),
    Case("opt", "opt", _OPT),
    Case(
        "opt-350m",
        "opt",
        _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 20, "activation_function": "gelu"},
    ),
    Case("opt-no-biases", "opt", _OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    Case(
        "opt-untied",
        "opt",
        _OPT | {"tie_word_embeddings": False, "word_embed_proj_dim": 24, "_remove_final_layer_norm": True},
    ),
]  # fmt: skip


def make(case: Case) -> PreTrainedModel:
    """The Transformers model, with weights that make every part matter."""
    settings = {"attn_implementation": "eager", **_SIZES, **case.settings}
    if case.model_type == "gpt2":
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            del settings[key]
    if case.model_type in ("gpt2", "opt"):
        for key in ("intermediate_size", "num_key_value_heads"):
            del settings[key]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.model_type, **settings)).eval()
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.copy_(noise * 0.3 + (0.0 if case.model_type.startswith("gemma") else 1.0))
            elif parameter.dim() == 1:
                parameter.copy_(noise * 0.3)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(noise * 0.7)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
    return model


def pair(case: Case, folder: Path) -> Pair:
    """The model made by Transformers, saved, and loaded again by Plait."""
    theirs = make(case)
    theirs.save_pretrained(folder)
    with SafetensorsCheckpoint(folder) as checkpoint:
        return Pair(case, theirs, load_transformer(checkpoint, FP32()), folder)


def random_ids(length: int, seed: int = 0) -> Tensor:
    """Token ids (length,)."""
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def at_once(model: Transformer, ids: Tensor) -> Tensor:
    """Logits (N, V) by the parallel form."""
    return model.logits(model(ids, Rows([(len(ids), 0)])))


@torch.inference_mode()
def through_memory(model: Transformer, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits (N, V) of a text read piece by piece."""
    past = model.new_past(MemoryPlan())
    logits = []
    for piece in ids.split(sizes):
        logits.append(model.logits(model(piece, Rows([(len(piece), len(past))]), [past])))
        past.commit()
    return torch.cat(logits)


@torch.inference_mode()
def theirs_through_cache(model: PreTrainedModel, ids: Tensor, sizes: list[int]) -> Tensor:
    """The same by Transformers."""
    cache, logits = None, []
    for piece in ids.split(sizes):
        result = model(piece[None], past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        logits.append(result.logits[0])
    return torch.cat(logits)


@torch.inference_mode()
def greedy(model: Transformer, ids: Tensor, count: int) -> list[int]:
    """The `count` most likely tokens, one after another."""
    past = model.new_past(MemoryPlan())
    chosen: list[int] = []
    piece = ids
    for _ in range(count):
        hidden = model(piece, Rows([(len(piece), len(past))]), [past])
        past.commit()
        chosen.append(int(model.logits(hidden[-1:]).argmax()))
        piece = torch.tensor(chosen[-1:])
    return chosen
