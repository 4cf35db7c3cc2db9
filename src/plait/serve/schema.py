"""What clients may send. A field that is not listed is refused by name, never ignored."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from plait.decode import Sampling
from plait.engine.edits import DEFAULT_REFRESH
from plait.errors import ConfigError

__all__ = [
    "BytesRequest",
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "DraftsRequest",
    "EditRequest",
    "EmbeddingsRequest",
    "ForkRequest",
    "GenerationOptions",
    "JSONObjectFormat",
    "JSONSchemaFormat",
    "Message",
    "NewSessionRequest",
    "ParallelRequest",
    "ReadRequest",
    "RewindRequest",
    "SessionGenerateRequest",
    "TokenizeRequest",
    "WatermarkCheckRequest",
    "WatermarkMarkRequest",
]

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Byte = Annotated[int, Field(ge=0, le=255)]
Stop = Annotated[str, Field(min_length=1)]

# Bytes that a request for laws may follow or write, each a short pass of the model.
_MOST_BYTES = 64


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """Options of a stream."""

    include_usage: bool = Field(False, description="End with a chunk that counts tokens.")


class TextFormat(_Body):
    """Any text."""

    type: Literal["text"]


class JSONObjectFormat(_Body):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(_Body):
    """A JSON schema with a name."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="The schema is always enforced, whatever this says.")


class JSONSchemaFormat(_Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JSONObjectFormat | JSONSchemaFormat, Field(discriminator="type")]


class GenerationOptions(_Body):
    """How an answer is chosen and when it ends; common to every route that generates."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    stop: Stop | list[Stop] | None = None
    ignore_end: bool | None = Field(None, description="Go on after an end-of-sequence token.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    trace: bool | None = Field(
        None, description="Tell what the memory and the draft do, in a stream's chunks."
    )
    user: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="Written to the server's log."
    )

    @model_validator(mode="after")
    def _check(self) -> GenerationOptions:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.trace and not self.stream:
            raise ValueError("trace needs stream: true")
        return self

    def sampling(self, logprobs: int | None) -> Sampling:
        """The settings that were given, with OpenAI's defaults for the others."""
        names = (
            "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
            "repetition_penalty", "seed",
        )  # fmt: skip
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        bias = (
            None if self.logit_bias is None else {int(key): value for key, value in self.logit_bias.items()}
        )
        return Sampling(**given, logit_bias=bias, logprobs=logprobs)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(GenerationOptions):
    """Continue one prompt or several."""

    model: str = Field(description="The name under which the server loaded its model.")
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Make this many and return the n with the highest mean log-probability of a token."
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = Field(
        None, description="Put the prompt before the answer; not together with logprobs."
    )

    @model_validator(mode="after")
    def _check_choices(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError("best_of must be at least n")
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise ValueError("best_of above n cannot be streamed, since the best are known at the end only")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo and logprobs are not supported together. plait score measures texts")
        return self


class TextPart(_Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One message of a conversation. The fields that must be null are those that clients send back from answers."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    def plain(self) -> dict[str, str]:
        """The message as chat templates know it."""
        content = (
            self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        )
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(GenerationOptions):
    """Answer a conversation."""

    model: str = Field(description="The name under which the server loaded its model.")
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_completion_tokens or max_tokens, not both")
        return self


class EmbeddingsRequest(_Body):
    """Ask for embeddings."""

    model: str
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"


class TokenizeRequest(_Body):
    """Turn a text, or a conversation, into token ids."""

    text: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = Field(
        None, description="Instead of text: a conversation, as the model's chat template writes it."
    )
    add_special: bool = Field(False, description="Put the tokens around a text that the model expects.")

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeRequest:
        if (self.text is None) == (self.messages is None):
            raise ValueError("give either text or messages")
        return self


class DetokenizeRequest(_Body):
    """Turn token ids into text."""

    tokens: list[TokenId]


class DraftsRequest(_Body):
    """Ask for several short drafts at the price of one."""

    prompt: Annotated[str, Field(min_length=1)]
    num_drafts: Annotated[int, Field(ge=1, le=16)] = 3
    max_tokens: Annotated[int, Field(ge=1, le=64)] = 10


class BytesRequest(_Body):
    """Ask for the law of the next byte."""

    prompt: str | list[Byte] = Field(description="Text, or bytes that may end inside a character.")
    before: Annotated[list[TokenId], Field(min_length=1)] | None = Field(
        None,
        description="Tokens before the prompt, such as those of a conversation from /tokenize; what starts a text "
        "when left out.",
    )
    then: (
        Annotated[str, Field(max_length=_MOST_BYTES)] | Annotated[list[Byte], Field(max_length=_MOST_BYTES)]
    ) = Field("", description="What follows the prompt; the law before each of its bytes is told.")
    top: Annotated[int, Field(ge=1, le=257)] = Field(10, description="How many outcomes are told.")
    max_bytes: Annotated[int, Field(ge=0, le=_MOST_BYTES)] = Field(
        0, description="Go on by that many bytes, the likeliest each time."
    )


class _WatermarkRequest(_Body):
    text: str
    key: Annotated[str, Field(min_length=22, max_length=1400, pattern=r"^[A-Za-z0-9+/]+={0,2}$")] = Field(
        description="16 secret bytes or more, in base64. Whoever has them finds the mark, and can remove it."
    )

    def secret(self) -> bytes:
        """The bytes of the key."""
        try:
            return base64.b64decode(self.key, validate=True)
        except binascii.Error as error:
            raise ConfigError(
                f"key is not base64: {error}. Make one: head -c 32 /dev/urandom | base64"
            ) from None


class WatermarkMarkRequest(_WatermarkRequest):
    """Mark a text."""

    max_replaced: Annotated[float, Field(gt=0, le=1)] = Field(
        0.25, description="Largest share of the words that is replaced."
    )
    target_z: Annotated[float, Field(gt=0, le=100)] = Field(6.0, description="Strength at which to stop.")


class WatermarkCheckRequest(_WatermarkRequest):
    """Look for the mark of a key."""

    precise: bool = Field(False, description="Ask the model which words could have been replaced.")
    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.01, description="Share of unmarked texts that may be taken for marked."
    )


class NewSessionRequest(_Body):
    """Open a session."""

    text: str = Field("", description="What it reads first.")


class ReadRequest(_Body):
    """Append a text."""

    text: str


class EditRequest(_Body):
    """Replace the characters [start, end) of what a session has read. A character is a Unicode code point."""

    start: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(ge=0)]
    text: str
    refresh: Annotated[int, Field(ge=0, le=4096)] | Literal["line"] = Field(
        DEFAULT_REFRESH,
        description="Tokens behind the edit that are read again, or line for the rest of its line.",
    )


class ForkRequest(_Body):
    """Make sessions with the same beginning."""

    count: Annotated[int, Field(ge=1, le=64)] = 1


class ParallelRequest(_Body):
    """Read texts apart from each other, to be used together."""

    texts: Annotated[list[str], Field(min_length=1, max_length=64)]
    prefix: str = ""
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.9
    scale: Annotated[float, Field(gt=0, le=10)] = 0.9


class RewindRequest(_Body):
    """Go back to the first tokens."""

    length: Annotated[int, Field(ge=0)]


class SessionGenerateRequest(GenerationOptions):
    """Continue a session; the answer becomes part of it."""

    text: str = Field("", description="Read before the answer.")
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
