"""Typed method objects and the spec strings that name them.

A method (a codec, a policy, a weight format, a speculator, ...) is a frozen dataclass that derives
from `Spec`. Its fields declare what is allowed, in the annotation, and one place enforces it:

    @dataclass(frozen=True, kw_only=True)
    class Window(Policy, name="window"):
        size: Annotated[int, Field(ge=1)] = 1024

`Window(size=64)` and the string `"window:size=64"` make the same object. Several methods are joined
by commas, and a name without settings takes the defaults: `"infllm:local=4096,topk=16,gear:bits=4"`. A setting that is
a method itself is written by its name, `distance_bias=harmonic`, or as JSON, `distance_bias={"name":"harmonic","limit":64}`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from plait.errors import ConfigError, UnknownNameError, suggestion

__all__ = ["Axis", "Spec", "bytes_of", "settings_of", "split_specs"]


class Axis:
    """The methods that answer one question, by name.

    Args:
        noun: what one method is called in messages, such as `"codec"`.
    """

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self.methods: dict[str, type[Spec]] = {}

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted(self.methods)

    def find(self, name: str) -> type[Spec]:
        """The class registered as `name`.

        Raises:
            UnknownNameError: nothing has that name; close names are suggested.
        """
        try:
            return self.methods[name]
        except KeyError:
            raise UnknownNameError(
                f"Unknown {self.noun} {name!r}.{suggestion(name, self.methods)}"
                f" Known: {', '.join(self.names())}."
            ) from None

    def parse(self, text: str) -> Any:
        """Build the method named by a spec string such as `"gear:bits=4,rank=2"`."""
        name, _, settings = text.strip().partition(":")
        return self.find(name).from_text(settings)


class Spec:
    """Base of every method object: a frozen dataclass whose annotations are its limits."""

    axis: ClassVar[Axis]
    name: ClassVar[str]

    def __init_subclass__(cls, *, name: str | None = None, axis: Axis | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if axis is not None:
            cls.axis = axis
        if name is not None:
            cls.name = name
            taken = cls.axis.methods.get(name)
            assert taken is None or taken.__qualname__ == cls.__qualname__, f"two {name!r}"
            cls.axis.methods[name] = cls

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = _checked(type(self), field.name, hints[field.name], getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` for settings that are allowed one by one but not together."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Build the object from what stands behind its name in a spec string.

        Raises:
            ConfigError: an unknown setting, or a value outside its limits.
        """
        return cls.from_settings(settings_of(text))

    @classmethod
    def from_settings(cls, settings: dict[str, str]) -> Self:
        """Build the object from the text of its settings.

        Raises:
            ConfigError: an unknown setting, or a value outside its limits.
        """
        hints = _hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key in settings:
            if key not in names:
                allowed = f"It takes {', '.join(names)}." if names else "It takes no settings."
                raise ConfigError(f"{cls.__name__} has no setting {key!r}.{suggestion(key, names)} {allowed}")
        return _made(
            cls, {key: _checked(cls, key, hints[key], text, text_form=True) for key, text in settings.items()}
        )

    def __str__(self) -> str:
        if not hasattr(self, "name"):
            return repr(self)
        changed = [
            f"{field.name}={_text(getattr(self, field.name))}"
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) != field.default
        ]
        return self.name + (":" + ",".join(changed) if changed else "")

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form: its settings, and its `name` where it has one. `from_json` reads it back."""
        named = {"name": self.name} if hasattr(self, "name") else {}
        return named | {
            field.name: _to_json(getattr(self, field.name))
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Build the object from its JSON form; `name` chooses the method where the class has an axis.

        Raises:
            ConfigError: an unknown name or setting, or a value outside its limits.
        """
        settings = dict(data)
        target: Any = cls
        # The base of an axis may be a dataclass itself, of settings that all its methods have.
        is_base = not hasattr(cls, "name") and "name" in settings and hasattr(cls, "axis")
        if is_base or not dataclasses.is_dataclass(target):
            target = cls.axis.find(str(settings.pop("name", None)))
        elif hasattr(cls, "name"):
            settings.pop("name", None)
        names = {field.name for field in dataclasses.fields(target)}
        unknown = sorted(set(settings) - names)
        if unknown:
            raise ConfigError(
                f"{target.__name__} has no setting {unknown[0]!r}.{suggestion(unknown[0], names)}"
            )
        return _made(target, settings)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        def read(value: Any) -> Any:
            if isinstance(value, cls):
                return value
            if isinstance(value, Mapping):
                return cls.from_json(value)
            if isinstance(value, str) and hasattr(cls, "axis") and not hasattr(cls, "name"):
                return cls.axis.parse(value)
            raise ValueError(f"a {cls.__name__}")

        return core_schema.no_info_plain_validator_function(read)


def split_specs(text: str) -> list[str]:
    """Split `"a:x=1,y=2,b,c:z=3"` into `["a:x=1,y=2", "b", "c:z=3"]`.

    A comma-separated piece with `=` and no `:` before it belongs to the method on its left.
    Commas inside brackets and braces do not split.

    Raises:
        ConfigError: a setting stands before any method name, or a piece is empty.
    """
    specs: list[str] = []
    for piece in _split_outside_brackets(text):
        piece = piece.strip()
        head, equals, _ = piece.partition("=")
        if not piece:
            raise ConfigError(f"Empty method name in {text!r}. Write it as name:key=value,name.")
        if equals and ":" not in head:
            if not specs:
                raise ConfigError(f"{text!r} starts with a setting. Write the method first: name:key=value.")
            specs[-1] += ("," if ":" in specs[-1] else ":") + piece
        else:
            specs.append(piece)
    return specs


def _split_outside_brackets(text: str) -> list[str]:
    pieces, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            pieces.append(text[start:i])
            start = i + 1
    return [*pieces, text[start:]]


def settings_of(text: str) -> dict[str, str]:
    """Read `"a=1,b=2"` into `{"a": "1", "b": "2"}`.

    Raises:
        ConfigError: a piece is not `key=value`, or a key is given twice.
    """
    settings: dict[str, str] = {}
    for piece in _split_outside_brackets(text) if text else []:
        key, equals, value = piece.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"{piece!r} in {text!r} is not a setting. Write it as key=value.")
        if key in settings:
            raise ConfigError(f"{key!r} is given twice in {text!r}.")
        settings[key] = value.strip()
    return settings


def bytes_of(size: int | str) -> int:
    """A number of bytes, given as such or as text: `64MB` is 64,000,000 and `64MiB` is 67,108,864.

    Raises:
        ConfigError: text of another form, or a number below 1.
    """
    units = {
        "": 1,
        "b": 1,
        "kb": 10**3,
        "mb": 10**6,
        "gb": 10**9,
        "kib": 1 << 10,
        "mib": 1 << 20,
        "gib": 1 << 30,
    }
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([a-z]*)", str(size).lower())
    if found is None or found[2] not in units or (count := int(float(found[1]) * units[found[2]])) < 1:
        raise ConfigError(
            f"A size is a number of bytes, or a number with kB, MB, GB, KiB, MiB or GiB. Got {size!r:.40}."
        )
    return count


def _made(cls: Any, values: dict[str, Any]) -> Any:
    """Build an object, or name the settings that have no default and were not given."""
    unset = dataclasses.MISSING
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is unset and field.default_factory is unset and field.name not in values
    ]
    if missing:
        raise ConfigError(f"{cls.__name__} needs {', '.join(missing)}. Give each a value.")
    return cls(**values)


def _hints(cls: Any) -> dict[str, Any]:
    return _known_hints(cls)


@functools.cache
def _known_hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


@functools.cache
def _adapter(hint: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


def _checked(cls: type, field: str, hint: Any, value: Any, *, text_form: bool = False) -> Any:
    from pydantic import ValidationError

    readings = [value]
    if text_form:
        # Nesting that is deeper than Python's stack is no setting either.
        with contextlib.suppress(ValueError, RecursionError):
            readings.insert(0, None if value == "none" else json.loads(value))
    failure: ValidationError | None = None
    for reading in readings:
        try:
            return _adapter(hint).validate_python(reading, strict=not isinstance(reading, (list, tuple)))
        except ValidationError as error:
            failure = error
    raise ConfigError(f"{cls.__name__}.{field} must be {_allowed(hint, failure)}. Got {value!r}.")


def _allowed(hint: Any, error: Any) -> str:
    """Say in words what an annotation allows."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        *rest, last = [str(choice) for choice in typing.get_args(hint)]
        return f"{', '.join(rest)} or {last}" if rest else last
    if origin is Annotated:
        base, *constraints = typing.get_args(hint)
        words = _limits(constraints)
        return " ".join(filter(None, [_allowed(base, error), words]))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_allowed(choice, error) for choice in typing.get_args(hint))
    if origin is tuple:
        return f"a list of which each is {_allowed(typing.get_args(hint)[0], error)}"
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    return plain.get(hint) or str(error.errors()[0]["msg"])


def _limits(constraints: list[Any]) -> str:
    limits: dict[str, Any] = {}
    for constraint in constraints:
        for item in [constraint, *getattr(constraint, "metadata", [])]:
            limits |= {
                k: getattr(item, k)
                for k in ("ge", "gt", "le", "lt", "multiple_of")
                if getattr(item, k, None) is not None
            }
    multiple = f", a multiple of {limits.pop('multiple_of')}" if "multiple_of" in limits else ""
    low = f"{'[' if 'ge' in limits else '('}{limits.get('ge', limits.get('gt', '-inf'))}"
    high = f"{limits.get('le', limits.get('lt', 'inf'))}{']' if 'le' in limits else ')'}"
    return (f"in {low}, {high}" if limits else "") + multiple


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(_to_json(value))


def _to_json(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_json()
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    return value
