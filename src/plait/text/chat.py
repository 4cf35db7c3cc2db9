"""Conversations as one text, by the Jinja template that came with a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from plait.errors import ConfigError, TemplateError
from plait.text.gguf_vocabulary import gguf_special_pieces
from plait.text.json_vocabulary import read_json, read_text
from plait.text.sandbox import SANDBOX

__all__ = ["ChatTemplate"]

_MAX_SOURCE = 256 << 10

_PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class ChatTemplate:
    """Turns a conversation into the text that a model was trained to see.

    The template runs in a process of its own, in which it can read nothing but the conversation and
    may take 0.5 s of CPU time, 256 MiB of memory and 4 Mi characters of output. It has what Hugging
    Face gives to templates: `raise_exception`, `strftime_now`, `tojson`, `namespace`, `break` and
    `continue`, `generation` blocks, and the usual methods of Python's strings, lists and dicts.

    The result holds special tokens by name. Encode it with `parse_special=True` and without
    `add_special`, because templates write BOS themselves; names of special tokens inside messages are
    then read as those tokens too.

    Args:
        source: Jinja source, at most 256 KiB.
        tool_source: another template for conversations with tools; None uses `source`.
        variables: what the template may use beside the conversation, such as `bos_token`.

    Raises:
        TemplateError: a source is not text, or too long.
    """

    def __init__(
        self,
        source: str,
        *,
        tool_source: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        for text in [source] if tool_source is None else [source, tool_source]:
            if not isinstance(text, str):
                raise TemplateError(f"A chat template must be text. Got {type(text).__name__}.")
            if len(text) > _MAX_SOURCE:
                raise TemplateError(f"A chat template has at most {_MAX_SOURCE} characters. Got {len(text)}.")
        self.source = source
        self.tool_source = tool_source
        self.variables = dict(variables or {})

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """The template in the metadata of a GGUF file.

        Raises:
            ConfigError: there is none: the model was not trained for chat.
            ModelFileError: the metadata is inconsistent.
        """
        source = _present(metadata.get("tokenizer.chat_template"))
        tool_source = metadata.get("tokenizer.chat_template.tool_use")
        return cls(source, tool_source=tool_source, variables=gguf_special_pieces(metadata))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str | None = None) -> Self:
        """The template in a tokenizer_config.json.

        Args:
            config: the contents of the file. Its `chat_template` is text, or a list of templates by
                name, of which `default` and `tool_use` are taken.
            source: the contents of chat_template.jinja, which wins.

        Raises:
            ConfigError: there is none: the model was not trained for chat.
        """
        found = config.get("chat_template") if source is None else source
        tool_source = None
        if isinstance(found, list):
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            found, tool_source = named.get("default"), named.get("tool_use")
        return cls(_present(found), tool_source=tool_source, variables=_special_tokens(config))

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The template of a Hugging Face folder: chat_template.jinja, or the one in tokenizer_config.json.

        Raises:
            ConfigError: there is none: the model was not trained for chat.
            ModelFileError: a file is damaged.
        """
        config, source = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        return cls.from_config(
            read_json(config) if config.is_file() else {}, read_text(source) if source.is_file() else None
        )

    @classmethod
    def plain(cls) -> Self:
        """Lines of `role: content`, for models that came without a template.

        Such a model does not know where its turn ends: give it the stop string `"\\nuser:"`.
        """
        return cls(_PLAIN)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The conversation as text.

        Args:
            messages: mappings with `role` and `content`, both text; `content` may be None beside
                `tool_calls`. Other keys are passed on.
            add_generation_prompt: end with the start of the assistant's turn.
            tools: JSON schemas of functions that the model may call.
            extra: more variables for the template.

        Raises:
            ConfigError: the messages are not of that form, or not of JSON's types.
            TemplateError: the template is wrong, refuses the conversation, or goes over a limit.
        """
        source = self.source if not tools or self.tool_source is None else self.tool_source
        context = {
            **self.variables,
            "messages": _checked(messages),
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **extra,
        }
        return SANDBOX.render(source, context)


def _present(source: str | None) -> str:
    if source is None:
        raise ConfigError(
            "This model has no chat template: it was not trained for chat. Give it plain text,"
            " or use ChatTemplate.plain()."
        )
    return source


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of a tokenizer_config.json, each given as text or as a mapping."""
    tokens = {name: config.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    contents = {name: t.get("content") if isinstance(t, Mapping) else t for name, t in tokens.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str)}


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ConfigError("Messages must be a list of at least one mapping with role and content.")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ConfigError(f"Message {position} must be a mapping. Got {type(message).__name__}.")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise ConfigError(f"Message {position} must have a role that is text. Got {role!r}.")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            kind = "no content" if content is None else type(content).__name__
            raise ConfigError(f"Message {position} must have content that is text. Got {kind}.")
    return [dict(message) for message in messages]
