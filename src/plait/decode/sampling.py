"""How the next token is to be chosen, as one validated value object."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from plait.spec import Spec

__all__ = ["Sampling"]


def _read_bias(given: Any) -> dict[int, float]:
    """Read a logit bias; digits as keys and "-inf" as a value are its JSON form."""
    bias: dict[int, float] = {}
    for key, value in given.items() if isinstance(given, Mapping) else [(None, None)]:
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        number = -math.inf if value == "-inf" else value
        if (
            isinstance(token, bool)
            or not isinstance(token, int)
            or token < 0
            or token in bias
            or isinstance(number, bool)
            or not isinstance(number, (int, float))
            or not (number == -math.inf or -100 <= number <= 100)
        ):
            raise PydanticCustomError(
                "logit_bias", "a mapping from token ids to numbers in [-100, 100] (-inf bans a token)"
            )
        bias[token] = float(number)
    return dict(sorted(bias.items()))


@dataclass(frozen=True, kw_only=True, repr=False)
class Sampling(Spec):
    """How the next token is chosen from the model's logits; the defaults sample the model's own law.

    The logits are warped in this order, which is that of Hugging Face wherever both have the option:
    logit_bias, repetition_penalty, frequency_penalty and presence_penalty, temperature, top_k, top_p, min_p.

    Args:
        temperature: divides the logits, [0, 100]; 0 is greedy: the likeliest token, the lowest id if tied.
        top_k: only the k likeliest tokens, and what ties with the last of them; 0 is off.
        top_p: only the fewest likeliest tokens whose probabilities sum to at least this, (0, 1]; 1 is off.
        min_p: only tokens with at least this fraction of the largest probability, [0, 1); 0 is off.
        repetition_penalty: weakens tokens of the prompt or the generated text, (0, 100]; 1 is off and
            less than 1 strengthens them.
        presence_penalty: subtracted from the logits of generated tokens, [-100, 100].
        frequency_penalty: subtracted from those logits once for each occurrence, [-100, 100].
        logit_bias: token id to a number in [-100, 100] that is added to its logit, or to `-inf`, which
            bans the token. Digits as keys and `"-inf"` as a value are read too, as JSON has them.
        seed: in [0, 2**64); the same seed gives the same text whatever else is running. None draws one.
        logprobs: how many alternatives to report beside each token's log-probability, [0, 20]; None
            reports nothing.

    Raises:
        ConfigError: a value outside those ranges, naming it.
    """

    name: ClassVar[str] = "sampling"

    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] = 0.0
    logit_bias: Annotated[dict[int, float], BeforeValidator(_read_bias)] | None = field(
        default=None, hash=False
    )
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def __repr__(self) -> str:
        given = {key: value for key, value in self.to_json().items() if key != "name" and value is not None}
        return f"Sampling({', '.join(f'{key}={value!r}' for key, value in given.items())})"

    @property
    def is_greedy(self) -> bool:
        """Whether the law has a single token."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether the law depends on the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form; without `"name"`, its items rebuild the object."""
        written = super().to_json()
        if self.logit_bias is not None:
            written["logit_bias"] = {
                str(token): "-inf" if value == -math.inf else value
                for token, value in self.logit_bias.items()
            }
        return written
