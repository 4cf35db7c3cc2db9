"""Every setting of the server, with one name for the flag, the environment variable and the TOML key."""

from __future__ import annotations

import ipaddress
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from plait.errors import ConfigError, suggestion

__all__ = ["Settings", "environment_name", "read_settings"]

_SHARED = ("model", "weights", "memory", "draft", "draft_model", "offline")


class Settings(BaseModel):
    """How a server runs.

    Raises:
        ConfigError: from `read_settings`; building one directly raises pydantic's error.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(default="smollm2", description="Alias, folder, .gguf file or hub id.")
    weights: str = Field(
        default="auto", description="How matrices are kept: fp32, bf16, q8_0, q4_0, ..., file or auto."
    )
    memory: str = Field(
        default="full", description="How the past is kept: full, window:size=1024, dense:dtype=bf16, ..."
    )
    draft: str = Field(
        default="none", description="How continuations are guessed: none, prompt-lookup, token-recycling, ..."
    )
    draft_model: str | None = Field(
        default=None, description="A smaller model of the same vocabulary to guess with."
    )
    offline: bool = Field(default=False, description="Never use the network to bring a model.")

    host: str = Field(
        default="127.0.0.1", description="Address to listen on. Any but loopback needs an API key."
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8000, description="Port to listen on; 0 takes a free one."
    )
    replicas: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1, description="Processes that each hold the model, behind one address."
    )

    api_keys: tuple[str, ...] = Field(
        default=(),
        description="Keys that clients must send, each a key or sha256: and the hash of one in hex. "
        "In the environment and as a flag: separated by commas.",
    )
    share_across_keys: bool = Field(
        default=False,
        description="Let requests of different keys share what is remembered of a common beginning.",
    )
    allowed_origins: tuple[str, ...] = Field(
        default=(),
        description="Origins of web pages on other addresses that may call the server, separated by commas.",
    )

    max_body_bytes: Annotated[int, Field(ge=1024)] = Field(
        default=2**20, description="Largest request body, in bytes."
    )
    max_json_depth: Annotated[int, Field(ge=4, le=256)] = Field(
        default=32, description="Deepest nesting of a request body."
    )
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Longest prompt, in tokens; the model's context when left out."
    )
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(
        default=4096, description="Most tokens of one answer."
    )
    max_choices: Annotated[int, Field(ge=1)] = Field(
        default=16, description="Most sequences of one request: prompts times n or best_of."
    )
    max_stops: Annotated[int, Field(ge=0)] = Field(default=16, description="Most stop texts of one request.")
    max_schema_bytes: Annotated[int, Field(ge=2)] = Field(
        default=65536, description="Largest JSON schema, in bytes."
    )
    max_text_chars: Annotated[int, Field(ge=1)] = Field(
        default=8192,
        description="Longest text whose bytes are asked for or that is watermarked, in characters.",
    )
    max_requests_per_key: Annotated[int, Field(ge=1)] = Field(
        default=64, description="Most unfinished sequences of one key; then 429."
    )
    max_requests: Annotated[int, Field(ge=1)] = Field(
        default=256, description="Most unfinished sequences; then 429."
    )
    max_sessions_per_key: Annotated[int, Field(ge=0)] = Field(
        default=16, description="Most open sessions of one key."
    )
    max_session_bytes: Annotated[int, Field(ge=0)] = Field(
        default=2**30, description="Most bytes that the sessions of all keys remember."
    )
    session_seconds: Annotated[float, Field(gt=0)] = Field(
        default=1800.0, description="Seconds after which a session that nobody uses is closed."
    )

    memory_bytes: Annotated[int, Field(ge=0)] = Field(
        default=2**30,
        description="Most bytes of keys, values and states that requests, and what is kept of earlier ones, take "
        "between steps; 0 has no limit and keeps nothing.",
    )
    rows_per_step: Annotated[int, Field(ge=1)] = Field(
        default=512, description="Most rows of one forward pass."
    )
    max_sequences: Annotated[int, Field(ge=1)] = Field(
        default=64, description="Most sequences that generate at once."
    )

    body_seconds: Annotated[float, Field(gt=0)] = Field(
        default=30.0, description="Seconds in which a request's body must arrive."
    )
    send_seconds: Annotated[float, Field(gt=0)] = Field(
        default=60.0,
        description="Seconds that a client may take to accept a piece of a stream before it is cancelled.",
    )
    ping_seconds: Annotated[float, Field(gt=0)] = Field(
        default=15.0, description="Seconds between comments that keep a silent stream open."
    )
    drain_seconds: Annotated[float, Field(ge=0)] = Field(
        default=30.0, description="Seconds in which answers may be finished when the server ends."
    )

    playground: bool = Field(default=True, description="Serve the playground page at /.")
    watermark: bool = Field(
        default=False, description="Mark and check English texts; brings WordNet, about 11 MB, at the start."
    )
    trace: bool = Field(default=True, description="Let requests ask what the memory and the draft do.")
    log_format: Literal["text", "json"] = Field(default="text", description="Log lines as text or as JSON.")
    log_prompts: bool = Field(default=False, description="Write prompts and answers to the log.")

    @field_validator("api_keys", "allowed_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part for part in (piece.strip() for piece in value.split(",")) if part)
        return value

    @model_validator(mode="after")
    def _closed_unless_asked(self) -> Settings:
        for key in self.api_keys:
            digest = key.removeprefix("sha256:")
            if key.startswith("sha256:") and (len(digest) != 64 or set(digest) - set("0123456789abcdef")):
                raise ValueError("a key that starts with sha256: needs 64 hexadecimal digits behind it")
            if len(digest) < 16:
                raise ValueError(
                    "an API key has at least 16 characters. Make one: python -c 'import secrets; "
                    "print(secrets.token_urlsafe(32))'"
                )
        if not self.is_loopback and not self.api_keys:
            raise ValueError(
                f"listening on {self.host} lets others in, which needs an API key. Give api_keys, or leave host out"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def environment_name(field: str) -> str:
    """The environment variable of a setting: `PLAIT_MODEL` as for all commands, else `PLAIT_SERVE_PORT`."""
    return f"PLAIT_{'' if field in _SHARED else 'SERVE_'}{field.upper()}"


def read_settings(
    flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None = None
) -> Settings:
    """Settings from flags, which win over the environment, which wins over a TOML file.

    Args:
        flags: by name; None is one that was not given.
        environment: `os.environ`, or a part of it.
        file: with the names of the settings as keys.

    Raises:
        ConfigError: the file cannot be read, a name is unknown, or a value is not allowed.
    """
    given: dict[str, Any] = {}
    known = Settings.model_fields
    if file is not None:
        try:
            written = tomllib.loads(file.read_text("utf-8"))
        except OSError as error:
            raise ConfigError(f"{file} could not be read: {error.strerror}.") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not TOML: {error}.") from None
        for name in written:
            if name not in known:
                raise ConfigError(f"{file} has no setting {name!r}.{suggestion(name, known)}")
        given |= written
    given |= {name: environment[key] for name in known if (key := environment_name(name)) in environment}
    given |= {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        message = str(first["msg"]).removeprefix("Value error, ")
        # The value is left out where it could be a key.
        shown = "" if not name or name.startswith("api_keys") else f" Got {first['input']!r}."
        raise ConfigError(f"{name or 'plait serve'}: {message}.{shown}") from None
