"""GGUF metadata in the words of a Hugging Face `config.json`.

The keys are those of the GGUF specification (ggml/docs/gguf.md), each below the architecture's name.
What no key says is told by which tensors there are, or known of the architecture (`Family.gguf_settings`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from plait.errors import ConfigError, ModelFileError
from plait.nn.checkpoints.base import Checkpoint
from plait.nn.families.settings import Settings, shown_value

__all__ = ["from_gguf"]

_SETTINGS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "norm_epsilon",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.dimension_count": "rotary_dim",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}

# Keys of rotary scalings, read by `_rope_scaling`.
_SCALING = {
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scale_linear",
}

# Other keys, with the values under which they change no logits; None for any value.
_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": None,
    "rope.scaling.finetuned": None,
    "tensor_data_layout": None,
    "use_parallel_residual": (False,),
    "vocab_size": None,
}

# The longest array that a setting can be, and the most channels of a head.
_LONGEST_ARRAY = 1 << 16


def from_gguf(checkpoint: Checkpoint, max_blocks: int) -> Settings:
    """The settings of a GGUF file.

    Args:
        max_blocks: the most blocks that the file can hold.

    Raises:
        ConfigError: a key that changes results and is not implemented, or a value of the wrong kind.
    """
    prefix = f"{checkpoint.metadata['general.architecture']}."
    given = {
        key.removeprefix(prefix): _plain(key, value)
        for key, value in checkpoint.metadata.items()
        if key.startswith(prefix)
    }
    values = {_SETTINGS[key]: value for key, value in given.items() if key in _SETTINGS}
    settings = Settings(_with_windows(values), max_blocks)
    _fill_from_tensors(settings, checkpoint)
    _fill_head_dim(settings)
    scaling = _rope_scaling(given, checkpoint)
    if scaling is not None:
        settings.set("rope_scaling", scaling)
    neutral = _NEUTRAL | {"attention.value_length": (settings.get("head_dim"),)}
    for key in sorted(given.keys() - _SETTINGS.keys() - _SCALING):
        allowed = neutral.get(key, ())
        if allowed is not None and given[key] not in allowed:
            raise ConfigError(
                f"the metadata set {prefix}{key} to {shown_value(given[key])}, which is not implemented."
            )
    return settings


def _plain(key: str, value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    if value.size > _LONGEST_ARRAY:
        raise ConfigError(f"the metadata give {key} {value.size} numbers, above {_LONGEST_ARRAY}.")
    return value.tolist()


def _with_windows(values: dict[str, Any]) -> dict[str, Any]:
    """A window of 0 is none; a pattern is a period, or says of each block whether it has the window."""
    window, pattern = values.get("sliding_window"), values.get("sliding_window_pattern")
    if window == 0:
        values["sliding_window"] = None
    if isinstance(pattern, list):
        del values["sliding_window_pattern"]
        values["layer_types"] = ["sliding_attention" if has else "full_attention" for has in pattern]
    return values


def _fill_from_tensors(settings: Settings, checkpoint: Checkpoint) -> None:
    tensors = checkpoint.tensors()
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ConfigError("the file has no matrix token_embd.weight. It is incomplete.")
    settings.assume(vocab_size=embedding.shape[0], tie_word_embeddings="output.weight" not in tensors)


def _fill_head_dim(settings: Settings) -> None:
    width, heads = settings.count("hidden_size"), settings.count("num_attention_heads")
    if width % heads == 0:
        settings.assume(head_dim=width // heads)
    elif settings.get("head_dim") is None:
        raise ConfigError(
            f"the metadata give {heads} attention heads, which do not divide the width {width}."
        )


def _rope_scaling(given: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The rotary scaling, from metadata or from tensors of divisors; None for plain rotary positions."""
    factor = given.get("rope.scaling.factor", given.get("rope.scale_linear"))
    kind = given.get("rope.scaling.type", "none" if factor is None else "linear")
    tensors = checkpoint.tensors()
    if "rope_factors_long.weight" in tensors and kind in ("none", "longrope"):
        return {
            "rope_type": "longrope",
            "short_factor": _divisors(checkpoint, "rope_factors_short.weight"),
            "long_factor": _divisors(checkpoint, "rope_factors_long.weight"),
            "attention_factor": given.get("rope.scaling.attn_factor"),
        }
    if given.get("rope.scaling.attn_factor", 1) != 1:
        raise ConfigError(
            f"the metadata set rope.scaling.attn_factor to {shown_value(given['rope.scaling.attn_factor'])},"
            " which is implemented with LongRoPE only."
        )
    if "rope_freqs.weight" in tensors and kind == "none":
        return {"rope_type": "factors", "factors": _divisors(checkpoint, "rope_freqs.weight")}
    if "rope_freqs.weight" in tensors or "rope_factors_long.weight" in tensors:
        raise ConfigError(
            f"the file has divisors of rotary speeds beside a scaling of type {shown_value(kind)}."
        )
    if kind == "none":
        return None
    return {
        "rope_type": kind,
        "factor": factor,
        "beta_fast": given.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": given.get("rope.scaling.yarn_beta_slow"),
    }


def _divisors(checkpoint: Checkpoint, name: str) -> list[float]:
    info = checkpoint.tensors().get(name)
    if info is None or len(info.shape) != 1 or info.shape[0] > _LONGEST_ARRAY:
        raise ModelFileError(f"{checkpoint.path}: {name} is not a list of divisors of rotary speeds.")
    divisors: list[float] = checkpoint.load(name).float().tolist()
    return divisors
