"""The entries of a model's configuration, read with their types checked.

A `config.json` comes from anywhere, so nothing about it is believed: every reading names the setting
that is missing or of the wrong kind. Readings are remembered, so that a setting which changes results
and which no family looked at is an error rather than a surprise (`Settings.check_unread`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from plait.errors import ConfigError, suggestion

__all__ = ["Settings", "shown_value"]

Choice = TypeVar("Choice")

# Larger counts cannot belong to a model; they only overflow later arithmetic.
_LARGEST_COUNT = 1 << 40

# Settings that change results, with the values under which they change nothing (None always is one).
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_chunk_size": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "is_encoder_decoder": (False,),
    "layer_types": (),
    "lm_head_bias": (False,),
    "logit_scale": (1,),
    "mlp_bias": (False,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "partial_rotary_factor": (1,),
    "qk_layernorm": (False,),
    "quantization_config": (),
    "residual_multiplier": (1,),
    "rope_local_base_freq": (),
    "rope_parameters": ({},),
    "rope_scaling": ({},),
    "rotary_dim": (),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "sliding_window": (),
    "sliding_window_pattern": (),
    "use_bidirectional_attention": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}


class Settings:
    """The settings of one model, in the words of a Hugging Face `config.json`.

    A setting that is null counts as absent, except where a method says otherwise.

    Args:
        values: settings by name.
        max_blocks: the most blocks that the file can hold; bounds `num_blocks`.
    """

    def __init__(self, values: Mapping[str, Any], max_blocks: int = 1024) -> None:
        self._values = dict(values)
        self._max_blocks = max_blocks
        self._read: set[str] = set()

    def assume(self, **defaults: Any) -> None:
        """Set what is absent; a null that was given stays."""
        self._values = defaults | self._values

    def set(self, key: str, value: Any) -> None:
        """Replace one setting."""
        self._values[key] = value

    def get(self, *keys: str) -> Any:
        """The first of these settings that is there, of any kind; None when all are absent."""
        self._read.update(keys)
        return next((self._values[key] for key in keys if self._values.get(key) is not None), None)

    def count(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`, under the first of these names that is there.

        Raises:
            ConfigError: it is something else, or absent and there is no default.
        """
        value = self.optional_count(*keys, least=least)
        if value is None:
            value = default
        return self._missing(keys[0]) if value is None else value

    def optional_count(self, *keys: str, least: int = 1) -> int | None:
        """A whole number of at least `least`, or None when it is absent.

        Raises:
            ConfigError: it is something else.
        """
        value = self.get(*keys)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST_COUNT:
            self._refuse(keys, value, f"a whole number in [{least}, {_LARGEST_COUNT}]")
        return value

    def number(self, *keys: str, default: float | None = None) -> float:
        """A finite number above 0, under the first of these names that is there.

        Raises:
            ConfigError: it is something else, or absent and there is no default.
        """
        value = self.optional_number(*keys)
        if value is None:
            value = default
        return self._missing(keys[0]) if value is None else value

    def optional_number(self, *keys: str) -> float | None:
        """A finite number above 0, or None when it is absent.

        Raises:
            ConfigError: it is something else.
        """
        value = self.get(*keys)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            self._refuse(keys, value, "a finite number above 0")
        try:
            return float(value)
        except OverflowError:
            self._refuse(keys, value, "a finite number above 0")

    def flag(self, key: str, *, default: bool) -> bool:
        """A boolean.

        Raises:
            ConfigError: it is something else.
        """
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._refuse((key,), value, "true or false")
        return value

    def choice(self, *keys: str, default: str, choices: Mapping[str, Choice]) -> Choice:
        """The meaning of a setting that names one of several choices.

        Args:
            default: name to assume when the setting is absent.
            choices: from the names that files use to ours.

        Raises:
            ConfigError: it names none of them.
        """
        value = self.get(*keys)
        if value is None:
            value = default
        if not isinstance(value, str) or value not in choices:
            near = suggestion(value, choices) if isinstance(value, str) else ""
            self._refuse(keys, value, f"one of {', '.join(sorted(choices))}", near)
        return choices[value]

    def num_blocks(self, *keys: str) -> int:
        """The number of blocks; no more than the file's tensors can make up.

        Raises:
            ConfigError: it is absent, not a count, or above what the file can hold.
        """
        blocks = self.count(*(keys or ("num_hidden_layers",)))
        if blocks > self._max_blocks:
            raise ConfigError(
                f"the configuration asks for {blocks} blocks, but the file has tensors for at most"
                f" {self._max_blocks}. It is incomplete, or its configuration describes another model."
            )
        return blocks

    def check_unread(self) -> None:
        """Make sure that no setting which changes results was passed over.

        Raises:
            ConfigError: a setting that this family does not have is set to more than its neutral value.
        """
        for key, neutral in _NEUTRAL.items():
            value = self._values.get(key)
            if key not in self._read and value is not None and value not in neutral:
                raise ConfigError(
                    f"the configuration sets {key} to {shown_value(value)}, which changes results and is not"
                    " implemented for this family. Use another model, or remove the setting if it is wrong."
                )

    def _missing(self, key: str) -> NoReturn:
        raise ConfigError(
            f"the configuration has no {key}. The file is incomplete, or describes another kind of model."
        )

    def _refuse(self, keys: tuple[str, ...], value: Any, allowed: str, near: str = "") -> NoReturn:
        key = next(key for key in keys if self._values.get(key) is not None)
        raise ConfigError(
            f"the configuration sets {key} to {shown_value(value)}. It must be {allowed}.{near}"
        )


def shown_value(value: Any) -> str:
    """A value from a file for a message: its `repr`, cut to a length that fits."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
