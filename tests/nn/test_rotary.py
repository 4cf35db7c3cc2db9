"""Turning speeds against Transformers, and what no scaling accepts."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from plait.errors import ConfigError
from plait.nn.rotary import (
    SCALINGS,
    DynamicNTK,
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    LongRoPE,
    RopeConfig,
    RopeScaling,
    YaRN,
    base_frequencies,
    rope_of,
)

# Two roundings of fp32.
ROUNDING = 2.5e-7


def theirs(rope: RopeConfig, longest: int, length: int | None = None) -> tuple[torch.Tensor, float]:
    """Speeds and amplitude by Transformers."""
    assert rope.scaling is not None
    scaling = {key: value for key, value in rope.scaling.to_json().items() if value is not None}
    kind = scaling.pop("name")
    config = LlamaConfig(
        hidden_size=rope.dim * 2,
        num_attention_heads=2,
        max_position_embeddings=longest,
        rope_parameters={"rope_type": kind, "rope_theta": rope.theta, **scaling},
    )
    return ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=length)


def check_equal(rope: RopeConfig, longest: int, length: int | None = None) -> None:
    speeds, amplitude = theirs(rope, longest, length)
    ours = rope_of(rope).for_length(length or longest)
    torch.testing.assert_close(ours.frequencies, speeds, rtol=ROUNDING, atol=0)
    assert ours.amplitude == pytest.approx(amplitude, rel=1e-12)


thetas = st.floats(100, 5e6)
dims = st.integers(2, 64).map(lambda pairs: 2 * pairs)
factors = st.floats(1.01, 64)
trained = st.integers(64, 32768)


@given(thetas, dims, factors)
@settings(max_examples=25, deadline=None)
def test_linear(theta: float, dim: int, factor: float) -> None:
    check_equal(RopeConfig(theta=theta, dim=dim, scaling=LinearScaling(factor=factor)), 4096)


@given(thetas, dims, factors, trained, st.floats(0.1, 6))
@settings(max_examples=25, deadline=None)
def test_dynamic(theta: float, dim: int, factor: float, longest: int, growth: float) -> None:
    scaling = DynamicNTK(factor=factor, original_max_position_embeddings=longest)
    check_equal(RopeConfig(theta=theta, dim=dim, scaling=scaling), longest, max(1, int(longest * growth)))


optional = st.none() | st.floats(0.1, 2)


@given(
    thetas,
    dims,
    factors,
    trained,
    st.floats(4, 64),
    st.floats(0.5, 3.9),
    optional,
    optional,
    optional,
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_yarn(
    theta: float,
    dim: int,
    factor: float,
    longest: int,
    fast: float,
    slow: float,
    mscale: float | None,
    mscale_all: float | None,
    attention: float | None,
    truncate: bool,
) -> None:
    scaling = YaRN(
        factor=factor,
        original_max_position_embeddings=longest,
        attention_factor=attention,
        beta_fast=fast,
        beta_slow=slow,
        mscale=mscale,
        mscale_all_dim=mscale_all,
        truncate=truncate,
    )
    rope = RopeConfig(theta=theta, dim=dim, scaling=scaling)
    # A pair in the middle of the ramp adds two terms, each rounded.
    speeds, amplitude = theirs(rope, longest)
    torch.testing.assert_close(rope_of(rope).frequencies, speeds, rtol=4 * ROUNDING, atol=0)
    assert rope_of(rope).amplitude == pytest.approx(amplitude, rel=1e-12)


@given(thetas, dims, factors, trained, st.floats(0.2, 4), st.floats(1.1, 8))
@settings(max_examples=40, deadline=None)
def test_llama3(theta: float, dim: int, factor: float, longest: int, low: float, ratio: float) -> None:
    scaling = Llama3Scaling(
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=low * ratio,
        original_max_position_embeddings=longest,
    )
    rope = RopeConfig(theta=theta, dim=dim, scaling=scaling)
    speeds, _ = theirs(rope, 2 * longest)
    torch.testing.assert_close(rope_of(rope).frequencies, speeds, rtol=8 * ROUNDING, atol=0)


@given(thetas, dims, factors, trained, optional, st.data())
@settings(max_examples=40, deadline=None)
def test_longrope(
    theta: float, dim: int, factor: float, longest: int, attention: float | None, data: st.DataObject
) -> None:
    divisors = st.lists(st.floats(0.5, 80), min_size=dim // 2, max_size=dim // 2)
    scaling = LongRoPE(
        short_factor=tuple(data.draw(divisors)),
        long_factor=tuple(data.draw(divisors)),
        factor=factor,
        original_max_position_embeddings=longest,
        attention_factor=attention,
    )
    rope = RopeConfig(theta=theta, dim=dim, scaling=scaling)
    for length in (1, longest, longest + 1, 3 * longest):
        check_equal(rope, 2 * longest, length)


def test_llama3_as_a_file_of_divisors() -> None:
    """GGUF files hold Llama 3 scaling as one divisor for each pair."""
    scaling = Llama3Scaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    wanted = rope_of(RopeConfig(theta=500000.0, dim=64, scaling=scaling)).frequencies
    divisors = base_frequencies(500000.0, 64) / wanted
    rope = RopeConfig(theta=500000.0, dim=64, scaling=FrequencyFactors(factors=tuple(divisors.tolist())))
    torch.testing.assert_close(rope_of(rope).frequencies, wanted, rtol=ROUNDING, atol=0)
    assert divisors.min() == 1
    assert divisors.max() == pytest.approx(32, rel=1e-6)


def test_amplitude_and_precision_reach_the_angles() -> None:
    scaling = YaRN(factor=4.0, original_max_position_embeddings=64, attention_factor=1.5)
    positions = torch.tensor([0, 1, 100_003])
    for angles in ("fp64", "fp32"):
        rope = rope_of(RopeConfig(dim=16, scaling=scaling, angles=angles))
        table = rope.angles(positions)
        turn = positions.double()[:, None] * rope.frequencies.double()
        error = (table.cos - 1.5 * turn.cos()).abs().max()
        assert (error < 1e-6) == (angles == "fp64")
        assert table.cos.dtype == torch.float32
        torch.testing.assert_close(
            table.cos.square() + table.sin.square(), torch.full((3, 8), 2.25), atol=1e-5, rtol=0
        )


def test_lengths_choose_the_speeds() -> None:
    scaling = LongRoPE(
        short_factor=(1.0, 2.0),
        long_factor=(3.0, 4.0),
        factor=4.0,
        original_max_position_embeddings=16,
    )
    rope = rope_of(RopeConfig(theta=100.0, dim=4, scaling=scaling, angles="fp32"))
    assert rope.for_length(16).frequencies.tolist() == pytest.approx([1, 0.05])
    assert rope.for_length(17).frequencies.tolist() == pytest.approx([1 / 3, 0.025])
    assert rope.for_length(17).dtype == torch.float32
    assert rope.amplitude == rope.for_length(17).amplitude == pytest.approx(math.sqrt(1.5))


EXAMPLES: list[RopeScaling] = [
    LinearScaling(factor=2.0),
    DynamicNTK(factor=2.0, original_max_position_embeddings=32),
    YaRN(factor=2.0, original_max_position_embeddings=32),
    Llama3Scaling(factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    LongRoPE(
        short_factor=(1.0, 2.0), long_factor=(3.0, 4.0), factor=2.0, original_max_position_embeddings=32
    ),
    FrequencyFactors(factors=(1.0, 2.0)),
]


def test_there_is_an_example_of_every_scaling() -> None:
    assert sorted(scaling.name for scaling in EXAMPLES) == SCALINGS.names()


@pytest.mark.parametrize("scaling", EXAMPLES, ids=lambda scaling: scaling.name)
def test_scalings_survive_json_and_their_spec_string(scaling: RopeScaling) -> None:
    assert SCALINGS.parse(str(scaling)) == scaling
    config = RopeConfig(dim=4, scaling=scaling)
    again = RopeConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert rope_of(again) is rope_of(config)


@pytest.mark.parametrize("scaling", EXAMPLES, ids=lambda scaling: scaling.name)
def test_every_scaling_has_finite_speeds_at_its_limits(scaling: RopeScaling) -> None:
    data = scaling.to_json()
    for factor in (1e-6, 1.0, 1e6):
        data |= {key: factor for key in ("factor",) if key in data}
        data |= {key: [factor, factor] for key in ("factors", "short_factor", "long_factor") if key in data}
        for theta in (1e-3, 1.0 + 1e-9, 1e18):
            try:
                config = RopeConfig(theta=theta, dim=4, scaling=RopeScaling.from_json(data))
            except ConfigError:
                assert scaling.name == "yarn"
                assert theta <= 1
                continue
            rope = rope_of(config)
            for length in (1, 33, 1 << 20):
                assert not rope.for_length(length).frequencies.isfinite().logical_not().any()
                assert math.isfinite(rope.for_length(length).amplitude)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("linear", {"factor": 0.0}, "LinearScaling.factor"),
        ("linear", {"factor": math.nan}, "LinearScaling.factor"),
        ("linear", {"factor": "8"}, "LinearScaling.factor"),
        ("dynamic", {"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ("yarn", {"beta_fast": -1.0}, "YaRN.beta_fast"),
        ("yarn", {"attention_factor": math.inf}, "YaRN.attention_factor"),
        ("yarn", {"truncate": 1}, "YaRN.truncate"),
        ("llama3", {"high_freq_factor": 1.0}, "high_freq_factor must be above low_freq_factor 1.0"),
        ("longrope", {"short_factor": [1.0]}, "short_factor must have 2 numbers"),
        ("longrope", {"long_factor": [1.0, 0.0]}, "long_factor"),
        ("longrope", {"original_max_position_embeddings": 1}, "original_max_position_embeddings"),
        ("factors", {"factors": []}, "factors"),
        ("factors", {"factors": [1.0, 2.0, 3.0]}, "factors must have 2 numbers"),
    ],
)
def test_values_outside_their_limits(kind: str, changes: dict[str, Any], message: str) -> None:
    (example,) = (scaling for scaling in EXAMPLES if scaling.name == kind)
    with pytest.raises(ConfigError, match=message):
        RopeConfig(dim=4, scaling=RopeScaling.from_json(example.to_json() | changes))


@pytest.mark.parametrize(
    ("theta", "dim", "kind"),
    [(10000.0, 2, "dynamic"), (1.0, 4, "yarn"), (0.0, 4, "linear"), (1e4, 3, "linear")],
)
def test_speeds_that_do_not_exist(theta: float, dim: int, kind: str) -> None:
    (example,) = (scaling for scaling in EXAMPLES if scaling.name == kind)
    with pytest.raises(ConfigError):
        RopeConfig(theta=theta, dim=dim, scaling=example)
