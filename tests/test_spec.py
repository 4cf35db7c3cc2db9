"""Method objects and the spec strings that name them; every registered method obeys its own limits."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pkgutil
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from plait.decode.speculate import Nothing, PromptLookup
from plait.errors import ConfigError, UnknownNameError
from plait.spec import Axis, Spec, settings_of, split_specs

COLOURS = Axis("colour")
EXAMPLES = settings(deadline=None, max_examples=200, derandomize=True)


class Colour(Spec, axis=COLOURS):
    """A toy axis."""


@dataclass(frozen=True, kw_only=True)
class Grey(Colour, name="grey"):
    """Every kind of setting."""

    level: Annotated[int, Field(ge=0, le=255)] = 128
    gamma: Annotated[float, Field(gt=0, lt=10)] = 2.2
    is_warm: bool = False
    label: str = "plain"
    bits: Literal[2, 4, 8] = 8
    kind: Literal["ink", "light"] = "light"
    limit: Annotated[int, Field(ge=1)] | None = None
    steps: tuple[int, ...] = ()

    def check(self) -> None:
        if self.is_warm and self.kind == "ink":
            raise ConfigError("Grey.kind 'ink' cannot be warm.")


@dataclass(frozen=True, kw_only=True)
class Mixed(Colour, name="mixed"):
    """A method that holds another one."""

    base: Colour = dataclasses.field(default_factory=Grey)


@dataclass(frozen=True, kw_only=True)
class Palette(Spec):
    """A settings object without a name."""

    colours: tuple[Colour, ...] = ()
    main: Grey | None = None


class Registered(NamedTuple):
    """One field of one registered class, its annotation, and a working value for every required field."""

    cls: type[Spec]
    field: str
    hint: Any


def registered_classes() -> list[type[Spec]]:
    """Every dataclass of the library that derives from `Spec`."""
    for room in ("memory", "weights", "nn", "decode"):
        package = importlib.import_module(f"plait.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"plait.{room}."):
            importlib.import_module(module.name)

    def below(cls: type[Spec]) -> Iterator[type[Spec]]:
        for child in cls.__subclasses__():
            yield child
            yield from below(child)

    found = [c for c in below(Spec) if dataclasses.is_dataclass(c) and c.__module__.startswith("plait.")]
    return sorted(set(found), key=lambda cls: f"{cls.__module__}.{cls.__name__}")


CLASSES = registered_classes()


def hints_of(cls: type[Spec]) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


FIELDS = [
    Registered(cls, field.name, hints_of(cls)[field.name])
    for cls in CLASSES
    for field in dataclasses.fields(cls)  # type: ignore[arg-type]
]
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


# Settings that work together, for classes in which the limits of one depend on another.
TOGETHER: dict[str, dict[str, Any]] = {
    "Llama3Scaling": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "Mix": {"parts": (Nothing(), PromptLookup(match=3))},
}


def limits_of(hint: Any) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    for constraint in typing.get_args(hint)[1:]:
        for item in [constraint, *getattr(constraint, "metadata", [])]:
            for name in ("ge", "gt", "le", "lt", "multiple_of"):
                if getattr(item, name, None) is not None:
                    limits[name] = getattr(item, name)
    return limits


def working_value(hint: Any) -> Any:
    """Some value that an annotation allows."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return arguments[0]
    if origin is Annotated:
        if arguments[0] not in (int, float):
            return working_value(arguments[0])
        limits = limits_of(hint)
        low = limits.get("ge", limits.get("gt", 0) + 1)
        return low + -low % limits.get("multiple_of", 1)
    if origin in (typing.Union, types.UnionType):
        return working_value(arguments[0])
    if origin is tuple:
        return (working_value(arguments[0]),)
    if isinstance(hint, type) and issubclass(hint, Spec):
        return working(hint if dataclasses.is_dataclass(hint) else next(iter(hint.axis.methods.values())))
    return {int: 1, float: 1.0, bool: True, str: "text"}[hint]


def working(cls: type[Spec], **settings_: Any) -> Any:
    """An object with defaults, and working values where there is none."""
    missing = dataclasses.MISSING
    required = {
        field.name: working_value(hints_of(cls)[field.name])
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.default is missing and field.default_factory is missing
    }
    return cls(**(required | TOGETHER.get(cls.__name__, {}) | settings_))


def wrong_values(hint: Any) -> list[Any]:
    """Values just outside what an annotation allows, and values of other types."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ["neither of these", 10**6, object()]
    if origin in (typing.Union, types.UnionType):
        return wrong_values(arguments[0])
    if origin is tuple:
        return [3, [object()], "text"]
    if origin is Annotated:
        wrong = wrong_values(arguments[0])
        if arguments[0] not in (int, float):
            return wrong
        limits = limits_of(hint)
        for name, sign in (("ge", -1), ("le", 1), ("gt", 0), ("lt", 0)):
            if name in limits and arguments[0] is int:
                wrong.append(limits[name] + sign)
            elif name in limits:
                wrong.append(math.nextafter(limits[name], sign * math.inf) if sign else limits[name])
        if "multiple_of" in limits:
            wrong.append(working_value(hint) + 1)
        return [*wrong, math.nan] if arguments[0] is float and limits else wrong
    if hint is int:
        return ["three", 1.5, True, [1]]
    if hint is float:
        return ["three", [1.0], object()]
    if hint is bool:
        return ["perhaps", 2, 0]
    if hint is str:
        return [3, None, ["text"]]
    return [3, "text", object(), {"no such setting": 1}]


@pytest.mark.parametrize("entry", FIELDS, ids=lambda entry: f"{entry.cls.__name__}.{entry.field}")
def test_values_outside_the_declared_limits_are_refused_by_name(entry: Registered) -> None:
    wrong = wrong_values(entry.hint)
    assert wrong
    for value in wrong:
        with pytest.raises(ConfigError, match=f"{entry.cls.__name__}.{entry.field} must be .*Got "):
            working(entry.cls, **{entry.field: value})


@each_class
def test_every_method_is_frozen_and_compares_by_value(cls: type[Spec]) -> None:
    one, other = working(cls), working(cls)
    assert one == other
    assert hash(one) == hash(other)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, field.name, None)


@each_class
def test_every_method_survives_json(cls: type[Spec]) -> None:
    one = working(cls)
    text = json.dumps(one.to_json(), allow_nan=False)
    assert cls.from_json(json.loads(text)) == one
    base = next(base for base in cls.__mro__[1:] if issubclass(base, Spec))
    if hasattr(cls, "name") and not dataclasses.is_dataclass(base) and hasattr(base, "axis"):
        assert base.from_json(json.loads(text)) == one


@each_class
def test_every_method_refuses_unknown_settings(cls: type[Spec]) -> None:
    with pytest.raises(ConfigError, match=f"{cls.__name__} has no setting 'nonsense_'"):
        cls.from_json({"nonsense_": 1})
    with pytest.raises(ConfigError, match=f"{cls.__name__} has no setting 'nonsense_'"):
        cls.from_settings({"nonsense_": "1"})


@each_class
def test_every_method_says_what_it_is(cls: type[Spec]) -> None:
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}("), (
        "dataclasses make a signature where there is no text"
    )


def test_every_axis_finds_its_methods_by_name() -> None:
    axes = {id(cls.axis): cls.axis for cls in CLASSES if hasattr(cls, "axis")}
    assert {axis.noun for axis in axes.values()} >= {"codec", "policy", "mixer", "weight format"}
    for axis in axes.values():
        for name in axis.names():
            assert axis.find(name).name == name


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("grey", Grey()),
        ("grey:level=3", Grey(level=3)),
        (" grey: level = 3 , gamma=1 ", Grey(level=3, gamma=1.0)),
        ("grey:is_warm=true,bits=4,kind=light", Grey(is_warm=True, bits=4)),
        ("grey:label=ink blue", Grey(label="ink blue")),
        ("grey:label=12", Grey(label="12")),
        ("grey:limit=null", Grey()),
        ("grey:limit=none", Grey()),
        ("grey:label=none", Grey(label="none")),
        ("grey:steps=[1,2,3],level=4", Grey(steps=(1, 2, 3), level=4)),
        ("grey:gamma=1e-3", Grey(gamma=1e-3)),
    ],
)
def test_a_spec_string_is_read_as_typed_values(text: str, wanted: Grey) -> None:
    assert COLOURS.parse(text) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gray", r"Unknown colour 'gray'. Did you mean 'grey'\? Known: grey, mixed"),
        ("", "Unknown colour ''. Known: grey, mixed"),
        ("grey:levle=3", r"Grey has no setting 'levle'. Did you mean 'level'\? It takes level, gamma"),
        ("grey:level", "'level' in 'level' is not a setting. Write it as key=value"),
        ("grey:=3", "'=3' in '=3' is not a setting"),
        ("grey:level=1,level=2", "'level' is given twice in 'level=1,level=2'"),
        ("grey:level=256", r"Grey.level must be a whole number in \[0, 255\]. Got '256'"),
        ("grey:level=true", r"Grey.level must be a whole number in \[0, 255\]. Got 'true'"),
        ("grey:level=1.0", r"Grey.level must be a whole number"),
        ("grey:gamma=0", r"Grey.gamma must be a number in \(0, 10\). Got '0'"),
        ("grey:gamma=NaN", r"Grey.gamma must be a number in \(0, 10\). Got 'NaN'"),
        ("grey:is_warm=yes", "Grey.is_warm must be true or false. Got 'yes'"),
        ("grey:bits=3", "Grey.bits must be 2, 4 or 8. Got '3'"),
        ("grey:kind=paper", "Grey.kind must be ink or light. Got 'paper'"),
        ("grey:limit=0", r"Grey.limit must be a whole number in \[1, inf\) or none. Got '0'"),
        ("grey:is_warm=true,kind=ink", "Grey.kind 'ink' cannot be warm"),
    ],
)
def test_a_wrong_spec_string_says_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        COLOURS.parse(text)


def test_an_unknown_name_has_an_error_of_its_own() -> None:
    with pytest.raises(UnknownNameError):
        COLOURS.find("blue")


@EXAMPLES
@given(
    level=st.integers(0, 255),
    gamma=st.floats(0.001, 9.999),
    label=st.text("abcxyz 0123", max_size=8).map(str.strip),
    bits=st.sampled_from([2, 4, 8]),
    limit=st.none() | st.integers(1, 10**9),
    steps=st.lists(st.integers(-5, 5), max_size=4).map(tuple),
)
def test_the_text_of_a_method_is_read_back(
    level: int, gamma: float, label: str, bits: Any, limit: int | None, steps: tuple[int, ...]
) -> None:
    one = Grey(level=level, gamma=gamma, label=label, bits=bits, limit=limit, steps=steps)
    assert COLOURS.parse(str(one)) == one
    assert split_specs(f"{one},grey,{one}") == [str(one), "grey", str(one)]
    assert Colour.from_json(json.loads(json.dumps(one.to_json()))) == one


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("a:x=1,y=2,b,c:z=3", ["a:x=1,y=2", "b", "c:z=3"]),
        ("a,x=1,b", ["a:x=1", "b"]),
        (" a , b:x=[1,2] ", ["a", "b:x=[1,2]"]),
        ("a:x=b:c,d", ["a:x=b:c", "d"]),
    ],
)
def test_settings_belong_to_the_method_on_their_left(text: str, wanted: list[str]) -> None:
    assert split_specs(text) == wanted


@pytest.mark.parametrize("text", ["", ",", "a,,b", "a,", "x=1", "x=1,a"])
def test_pieces_without_a_method_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"Empty method name|starts with a setting"):
        split_specs(text)


def test_settings_are_read_in_order() -> None:
    assert settings_of("") == {}
    assert list(settings_of("b=1, a=x=y,c=[1,2]").items()) == [("b", "1"), ("a", "x=y"), ("c", "[1,2]")]


@EXAMPLES
@given(st.text("greyo:=,[]{}\"' \\n012.-enull", max_size=30) | st.text(max_size=20))
def test_any_text_makes_a_method_or_one_clear_error(text: str) -> None:
    for read in (COLOURS.parse, split_specs, settings_of, lambda t: COLOURS.parse(f"grey:{t}")):
        try:
            read(text)
        except ConfigError as error:
            assert str(error)  # noqa: PT017


@each_class
def test_settings_without_a_default_are_asked_for(cls: type[Spec]) -> None:
    missing = dataclasses.MISSING
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    needed = [f.name for f in fields if f.default is missing and f.default_factory is missing]
    for build in (lambda: cls.from_json({}), lambda: cls.from_settings({})):
        if needed:
            with pytest.raises(ConfigError, match=f"{cls.__name__} needs {', '.join(needed)}. Give each"):
                build()
        else:
            assert build() == working(cls)


def test_a_method_that_holds_methods_is_read_back_from_its_text() -> None:
    mixed = Mixed(base=Grey(level=3, steps=(1, 2)))
    assert COLOURS.parse(str(mixed)) == mixed
    assert split_specs(f"{mixed},grey") == [str(mixed), "grey"]


def test_a_value_nested_too_deep_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"Grey.level must be a whole number"):
        COLOURS.parse("grey:level=" + "[" * 100_000)


def test_multiples_and_lists_are_said_in_words() -> None:
    from plait.nn.rotary import RopeConfig

    with pytest.raises(
        ConfigError, match=r"RopeConfig.dim must be a whole number in \[2, inf\), a multiple of 2. Got 3"
    ):
        RopeConfig(dim=3)
    with pytest.raises(
        ConfigError, match=r"Grey.steps must be a list of which each is a whole number. Got 3"
    ):
        Grey(steps=3)  # type: ignore[arg-type]


def test_methods_hold_methods() -> None:
    assert Colour.from_json({"name": "mixed", "base": {"name": "grey", "level": 3}}) == Mixed(
        base=Grey(level=3)
    )
    palette = Palette(colours=(Grey(level=1), Mixed()), main=Grey())
    assert Palette.from_json(json.loads(json.dumps(palette.to_json()))) == palette
    with pytest.raises(ConfigError, match=r"Mixed.base must be .*Unknown colour 'blue'"):
        Colour.from_json({"name": "mixed", "base": {"name": "blue"}})
    with pytest.raises(ConfigError, match=r"Palette.main must be .*Grey.level must be a whole number"):
        Palette.from_json({"main": {"level": -1}})


def test_a_list_becomes_a_tuple_and_numbers_keep_their_kind() -> None:
    grey = Grey(steps=[1, 2], gamma=3)  # type: ignore[arg-type]
    assert grey.steps == (1, 2)
    assert isinstance(grey.gamma, float)
    assert isinstance(Grey(level=3).level, int)
