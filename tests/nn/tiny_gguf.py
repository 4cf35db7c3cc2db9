"""Tiny models of Transformers written as GGUF files, in the conventions of llama.cpp's converter.

Names come from the gguf package, keys from its writer; nothing here is shared with Plait's reader.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "starcoder2": gguf.MODEL_ARCH.STARCODER2,
}


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    extra: dict[str, Any] | None = None,
    dtype: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> None:
    """Write a model.

    Args:
        extra: further metadata, by key below the architecture's name; None leaves a key out.
        dtype: format of the matrices.
    """
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    name = gguf.MODEL_ARCH_NAMES[architecture]
    writer = gguf.GGUFWriter(path, name)
    for key, value in (_metadata(config) | (extra or {})).items():
        if value is not None:
            _add(writer, f"{name}.{key}", value)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for theirs, tensor in model.state_dict().items():
        if theirs == "lm_head.weight" and config.tie_word_embeddings:
            continue
        converted = _converted(config, theirs, tensor.float())
        data = converted.contiguous().numpy()
        target = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert target is not None, theirs
        if converted.dim() == 2 and dtype != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(target, gguf.quants.quantize(data, dtype), raw_dtype=dtype)
        else:
            writer.add_tensor(target, data)
    for target, divisors in _divisors(config).items():
        writer.add_tensor(target, torch.tensor(divisors, dtype=torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _metadata(config: Any) -> dict[str, Any]:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": heads,
    }
    if config.model_type == "gpt2":
        inner = config.n_inner or 4 * config.n_embd
        return metadata | {
            "feed_forward_length": inner,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    full = config.rope_parameters.get("full_attention", config.rope_parameters)
    metadata |= {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": float(full["rope_theta"]),
    }
    if config.model_type == "starcoder2":
        metadata["attention.layer_norm_epsilon"] = config.norm_epsilon
    else:
        metadata["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    if head_dim * heads != config.hidden_size or config.model_type.startswith(("gemma", "qwen3")):
        metadata |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if config.model_type in ("llama", "mistral", "phi3"):
        metadata["rope.dimension_count"] = int(head_dim * full.get("partial_rotary_factor", 1.0))
    if config.model_type.startswith("gemma"):
        metadata |= {"attention.sliding_window": config.sliding_window}
    if config.model_type == "phi3":
        metadata["attention.sliding_window"] = config.sliding_window or 0
        metadata["rope.scaling.original_context_length"] = config.original_max_position_embeddings
    for softcap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, softcap, None) is not None:
            metadata[softcap] = getattr(config, softcap)
    return metadata | _scaling(config, full)


def _scaling(config: Any, full: dict[str, Any]) -> dict[str, Any]:
    if full["rope_type"] == "longrope":
        ratio = config.max_position_embeddings / full["original_max_position_embeddings"]
        amplitude = math.sqrt(1 + math.log(ratio) / math.log(full["original_max_position_embeddings"]))
        return {"rope.scaling.attn_factor": amplitude}
    if full["rope_type"] not in ("linear", "yarn"):
        return {}
    keys = {
        "rope_type": "rope.scaling.type",
        "factor": "rope.scaling.factor",
        "original_max_position_embeddings": "rope.scaling.original_context_length",
        "beta_fast": "rope.scaling.yarn_beta_fast",
        "beta_slow": "rope.scaling.yarn_beta_slow",
    }
    return {key: full[name] for name, key in keys.items() if name in full}


def _divisors(config: Any) -> dict[str, list[float]]:
    """Tensors of rotary divisors."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{kind}.weight": rope[f"{kind}_factor"] for kind in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    trained, low, high = (
        rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    divisors = []
    for pair in range(config.head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * pair / config.head_dim)
        if wavelength < trained / high:
            divisors.append(1.0)
        elif wavelength > trained / low:
            divisors.append(rope["factor"])
        else:
            kept = (trained / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - kept) / rope["factor"] + kept))
    return {"rope_freqs.weight": divisors}


def _converted(config: Any, name: str, tensor: Tensor) -> Tensor:
    if config.model_type in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if config.model_type == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.T
    return tensor
