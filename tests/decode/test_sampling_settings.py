"""The settings object: what it refuses is what its annotations declare, in one sentence."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import typing
from typing import Any

import pytest

from plait.decode import Sampler, Sampling
from plait.errors import ConfigError


def declared_limits() -> dict[str, tuple[type, dict[str, float]]]:
    """Type and limits of every numeric field, read from the annotations."""
    limits: dict[str, tuple[type, dict[str, float]]] = {}
    hints = typing.get_type_hints(Sampling, include_extras=True)
    for field in dataclasses.fields(Sampling):
        for hint in [hints[field.name], *typing.get_args(hints[field.name])]:
            arguments = typing.get_args(hint)
            if typing.get_origin(hint) is typing.Annotated and arguments[0] in (int, float):
                limits[field.name] = (
                    arguments[0],
                    {
                        key: getattr(each, key)
                        for each in arguments[1].metadata
                        for key in ("ge", "gt", "le", "lt")
                        if hasattr(each, key)
                    },
                )
    return limits


def just_inside(kind: type, limits: dict[str, float]) -> list[float]:
    if kind is int:
        return [limits[key] for key in ("ge", "le") if key in limits]
    inside = [limits[key] for key in ("ge", "le") if key in limits]
    inside += [math.nextafter(limits["gt"], math.inf)] if "gt" in limits else []
    inside += [math.nextafter(limits["lt"], -math.inf)] if "lt" in limits else []
    return inside


def just_outside(kind: type, limits: dict[str, float]) -> list[Any]:
    wrong: list[Any] = [limits[key] for key in ("gt", "lt") if key in limits]
    for key, away in (("ge", -1), ("le", 1)):
        if key in limits:
            wrong.append(limits[key] + away if kind is int else math.nextafter(limits[key], away * math.inf))
    wrong += [math.nan, math.inf, -math.inf, True, "1", [1], {}, b"1", 1j]
    return wrong + ([0.5, 1.0] if kind is int else [10**400, -(10**400)])


LIMITS = declared_limits()


def test_every_field_but_the_bias_declares_its_limits() -> None:
    assert {field.name for field in dataclasses.fields(Sampling)} == {*LIMITS, "logit_bias"}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, limits in LIMITS.items() for value in just_inside(*limits)]
)
def test_values_at_the_limits_are_taken(field: str, value: Any) -> None:
    assert getattr(Sampling(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, limits in LIMITS.items() for value in just_outside(*limits)],
)
def test_values_outside_the_limits_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^Sampling\.{field} must be a .* Got "):
        Sampling(**{field: value})  # type: ignore[arg-type]


def test_a_refusal_is_one_sentence_with_what_is_allowed() -> None:
    with pytest.raises(ConfigError) as refused:
        Sampling(top_p=1.5)
    assert str(refused.value) == "Sampling.top_p must be a number in (0, 1]. Got 1.5."
    with pytest.raises(ConfigError) as refused:
        Sampling(logit_bias={7: 101})
    assert str(refused.value) == (
        "Sampling.logit_bias must be a mapping from token ids to numbers in [-100, 100] (-inf bans a token)"
        " or none. Got {7: 101}."
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {-1: 0.0}, {1.0: 0.0}, {True: 0.0}, {"x": 0.0}, {"-1": 0.0}, {"²": 0.0}, {None: 0.0}, {1: 0.0, "1": 0.0},
        {1: 100.5}, {1: -101}, {1: math.inf}, {1: math.nan}, {1: "1"}, {1: None}, {1: True}, {1: [0]}, {1: 10**400},
        [(1, 0.0)], "1", 1, 0.5, True,
    ],
)  # fmt: skip
def test_a_bias_that_is_not_ids_to_small_numbers_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"^Sampling\.logit_bias must be a mapping from token ids"):
        Sampling(logit_bias=wrong)


def test_defaults_sample_the_models_own_law() -> None:
    neutral = Sampling()
    assert neutral.temperature == 1.0
    assert not neutral.is_greedy
    assert not neutral.has_penalties


def test_settings_survive_json_and_repr() -> None:
    sampling = Sampling(
        temperature=0.5, top_k=3, logit_bias={9: -math.inf, 4: 1.5}, seed=2**64 - 1, logprobs=0, min_p=0.25
    )
    written = json.loads(json.dumps(sampling.to_json(), allow_nan=False))
    assert written.pop("name") == "sampling"
    assert Sampling(**written) == sampling
    call = ast.parse(repr(sampling), mode="eval").body
    assert isinstance(call, ast.Call)
    arguments = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    assert Sampling(**arguments) == sampling


def test_settings_are_values_that_callers_cannot_change_afterwards() -> None:
    bias = {1: 2.0}
    sampling = Sampling(logit_bias=bias)
    bias[1] = 50.0
    assert sampling.logit_bias == {1: 2.0}
    assert hash(sampling) == hash(Sampling(logit_bias={"1": 2}))  # type: ignore[dict-item]
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampling.temperature = 0.0  # type: ignore[misc]


def test_settings_are_read_from_text() -> None:
    read = Sampling.from_settings({"temperature": "0", "top_k": "40", "logit_bias": '{"5": -1}'})
    assert read == Sampling(temperature=0, top_k=40, logit_bias={5: -1})
    with pytest.raises(ConfigError, match=r"^Sampling has no setting 'topp'. Did you mean 'top_p'\?"):
        Sampling.from_settings({"topp": "0.5"})


def test_a_bias_outside_the_vocabulary_is_refused_when_bound() -> None:
    sampling = Sampling(logit_bias={9: 1.0, 10: -math.inf})
    assert Sampler(sampling, 11).vocab_size == 11
    with pytest.raises(
        ConfigError, match=r"^Sampling.logit_bias names token 10, but the vocabulary has ids 0 to 9"
    ):
        Sampler(sampling, 10)


@pytest.mark.parametrize("wrong", [0, -1, True, 1.0, "5"])
def test_a_vocabulary_needs_a_size(wrong: int) -> None:
    with pytest.raises(ConfigError, match=r"^Sampler.vocab_size must be a whole number in \[1, inf\). Got "):
        Sampler(Sampling(), wrong)
