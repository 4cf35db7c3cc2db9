"""Rotary positions of a layer as data, and the scalings that stretch them to longer contexts.

The fields of a scaling are called as in a Hugging Face `config.json`, and its speeds equal those of
Transformers to fp32 rounding. Below, θ is the base, R the number of rotated channels, and
s_c = θ^(-2c/R) the unscaled speed of pair c in radians per position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from plait.errors import ConfigError
from plait.ops import Rope
from plait.spec import Axis, Spec

__all__ = [
    "SCALINGS",
    "DynamicNTK",
    "FrequencyFactors",
    "LinearScaling",
    "Llama3Scaling",
    "LongRoPE",
    "RopeConfig",
    "RopeScaling",
    "YaRN",
    "base_frequencies",
    "rope_of",
]

SCALINGS = Axis("rotary scaling")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Far beyond any model's, and close enough to 1 that no product of them leaves the range of fp32.
Factor = Annotated[float, Field(ge=1e-6, le=1e6)]
Positions = Annotated[int, Field(ge=1, le=1 << 40)]
Factors = Annotated[tuple[Factor, ...], Field(min_length=1)]


class RopeScaling(Spec, axis=SCALINGS):
    """A change of the turning speeds that lets a model read further than it was first trained for."""

    def rope(self, theta: float, dim: int) -> Rope:
        """The speeds of `dim` rotated channels with base `theta`."""
        raise NotImplementedError

    def check_for(self, theta: float, dim: int) -> None:
        """Raise `ConfigError` when this scaling has no speeds for that base and number of channels."""


@dataclass(frozen=True, kw_only=True)
class RopeConfig(Spec):
    """Rotary positions of a layer.

    Args:
        theta: base of the geometric series of turning speeds.
        dim: number of rotated channels of a head.
        scaling: how the speeds are stretched, or None.
        angles: precision of position times speed. `fp64` keeps frames exact; `fp32` repeats the
            rounding of Hugging Face Transformers, which shows from about a thousand tokens on.
    """

    theta: Annotated[float, Field(ge=1e-3, le=1e18)] = 10000.0
    dim: Annotated[int, Field(ge=2, multiple_of=2)]
    scaling: RopeScaling | None = None
    angles: Literal["fp64", "fp32"] = "fp64"

    def check(self) -> None:
        if self.scaling is not None:
            self.scaling.check_for(self.theta, self.dim)


@dataclass(frozen=True, kw_only=True)
class LinearScaling(RopeScaling, name="linear"):
    """Every speed divided by `factor`: positions are squeezed into the trained range.

    Source: Chen et al. 2023, arXiv:2306.15595 (position interpolation).
    """

    factor: Factor

    def rope(self, theta: float, dim: int) -> Rope:
        return Rope(base_frequencies(theta, dim) / self.factor)


@dataclass(frozen=True, kw_only=True)
class DynamicNTK(RopeScaling, name="dynamic"):
    """A base that grows with the sequence once it is longer than `original_max_position_embeddings` L.

    At length T > L the base is θ (factor T / L - factor + 1)^(R / (R - 2)), so that the slowest pair
    turns as under linear scaling and the fastest hardly changes. Keys stay as they were rotated when
    they were written, as in Transformers, so a long text read at once and one read piece by piece differ.

    Source: section 3.1 of Peng et al. 2023, arXiv:2309.00071 ("dynamic NTK").
    """

    factor: Factor
    original_max_position_embeddings: Positions

    def check_for(self, theta: float, dim: int) -> None:
        if dim < 4:
            raise ConfigError(f"DynamicNTK needs 4 or more rotated channels. Got {dim}.")

    def rope(self, theta: float, dim: int) -> Rope:
        trained = self.original_max_position_embeddings

        def for_length(length: int) -> tuple[Tensor, float]:
            growth = self.factor * max(length, trained) / trained - (self.factor - 1)
            return base_frequencies(theta * growth ** (dim / (dim - 2)), dim), 1.0

        return Rope(*for_length(trained), rule=for_length)


@dataclass(frozen=True, kw_only=True)
class YaRN(RopeScaling, name="yarn"):
    """Slow pairs are interpolated, fast pairs are left alone, with a linear ramp over the pairs between.

    The ramp runs over the pairs that make between `beta_fast` and `beta_slow` full turns in
    `original_max_position_embeddings` positions; its ends are whole numbers when `truncate`. Cosine and
    sine are multiplied by `attention_factor`; when that is None, by m(factor, `mscale`) /
    m(factor, `mscale_all_dim`) if both are given and not 0, else by m(factor, 1), where
    m(f, a) = 0.1 a ln f + 1, and 1 for f <= 1.

    Source: Peng et al. 2023, arXiv:2309.00071, sections 3.2 to 3.4.
    """

    factor: Factor
    original_max_position_embeddings: Positions
    attention_factor: Positive | None = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    mscale_all_dim: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    truncate: bool = True

    def check_for(self, theta: float, dim: int) -> None:
        if theta <= 1:
            raise ConfigError(f"YaRN needs a base theta above 1. Got {theta}.")

    def rope(self, theta: float, dim: int) -> Rope:
        def pair_with(turns: float) -> float:
            """The pair, as a real number, that makes so many turns in the original context."""
            wavelength = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return dim * math.log(wavelength) / (2 * math.log(theta))

        low, high = pair_with(self.beta_fast), pair_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001
        ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        periods = theta ** (torch.arange(0, dim, 2).float() / dim)
        speeds = 1.0 / (self.factor * periods) * ramp + 1.0 / periods * (1 - ramp)
        return Rope(speeds, amplitude=self._amplitude())

    def _amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor

        def magnitude(weight: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return magnitude(self.mscale) / magnitude(self.mscale_all_dim)
        return magnitude(1.0)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RopeScaling, name="llama3"):
    """Slow pairs divided by `factor`, fast pairs left alone, a smooth mixture between.

    With L = `original_max_position_embeddings` and w_c = 2π / s_c the wavelength: speeds with
    w_c > L / low are divided by `factor`, those with w_c < L / high stay, and between them the speed is
    (1 - t) s_c / factor + t s_c with t = (L / w_c - low) / (high - low).

    Source: Grattafiori et al. 2024, arXiv:2407.21783, and the code published with Llama 3.1.
    """

    factor: Factor
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Positions

    def check(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"Llama3Scaling.high_freq_factor must be above low_freq_factor {self.low_freq_factor}."
                f" Got {self.high_freq_factor}."
            )

    def rope(self, theta: float, dim: int) -> Rope:
        speeds = base_frequencies(theta, dim)
        wavelengths = 2 * math.pi / speeds
        trained, low, high = (
            self.original_max_position_embeddings,
            self.low_freq_factor,
            self.high_freq_factor,
        )
        kept = (trained / wavelengths - low) / (high - low)
        mixed = (1 - kept) * speeds / self.factor + kept * speeds
        scaled = torch.where(wavelengths > trained / low, speeds / self.factor, mixed)
        return Rope(torch.where(wavelengths < trained / high, speeds, scaled))


@dataclass(frozen=True, kw_only=True)
class LongRoPE(RopeScaling, name="longrope"):
    """A divisor for each pair, found by search: one list for short sequences, one for long ones.

    `short_factor` holds up to `original_max_position_embeddings` L positions, `long_factor` beyond; each
    has R / 2 numbers. Cosine and sine are multiplied by `attention_factor`, or when that is None by
    sqrt(1 + ln factor / ln L), and by 1 for factor <= 1. Keys stay as they were rotated when they were
    written, so a text that crosses L piece by piece differs from one read at once.

    Source: Ding et al. 2024, arXiv:2402.13753, as used by Phi-3.
    """

    short_factor: Factors
    long_factor: Factors
    factor: Factor
    original_max_position_embeddings: Annotated[int, Field(ge=2, le=1 << 40)]
    attention_factor: Positive | None = None

    def check_for(self, theta: float, dim: int) -> None:
        _check_length("LongRoPE.short_factor", self.short_factor, dim)
        _check_length("LongRoPE.long_factor", self.long_factor, dim)

    def rope(self, theta: float, dim: int) -> Rope:
        amplitude = self.attention_factor
        if amplitude is None:
            growth = math.log(max(self.factor, 1.0)) / math.log(self.original_max_position_embeddings)
            amplitude = math.sqrt(1 + growth)
        periods = theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
        short = (1.0 / (torch.tensor(self.short_factor, dtype=torch.float32) * periods), amplitude)
        long = (1.0 / (torch.tensor(self.long_factor, dtype=torch.float32) * periods), amplitude)
        return Rope(
            *short, rule=lambda length: long if length > self.original_max_position_embeddings else short
        )


@dataclass(frozen=True, kw_only=True)
class FrequencyFactors(RopeScaling, name="factors"):
    """A divisor for each pair, whatever the length: R / 2 numbers.

    Source: the tensor `rope_freqs.weight` of GGUF files, in which Llama 3 scaling is stored.
    """

    factors: Factors

    def check_for(self, theta: float, dim: int) -> None:
        _check_length("FrequencyFactors.factors", self.factors, dim)

    def rope(self, theta: float, dim: int) -> Rope:
        return Rope(base_frequencies(theta, dim) / torch.tensor(self.factors, dtype=torch.float32))


def base_frequencies(theta: float, dim: int) -> Tensor:
    """Unscaled turning speeds in radians per position, (dim / 2,) fp32."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


@cache
def rope_of(config: RopeConfig) -> Rope:
    """The turning speeds of a configuration; layers with equal configurations share them."""
    if config.scaling is None:
        rope = Rope(base_frequencies(config.theta, config.dim))
    else:
        rope = config.scaling.rope(config.theta, config.dim)
    return replace(rope, dtype=torch.float64 if config.angles == "fp64" else torch.float32)


def _check_length(name: str, factors: tuple[float, ...], dim: int) -> None:
    if len(factors) != dim // 2:
        raise ConfigError(
            f"{name} must have {dim // 2} numbers, one for each pair of {dim} rotated channels."
            f" Got {len(factors)}."
        )
