"""Chat templates render what Hugging Face renders, and refuse what it refuses."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pytest
from chat_templates import CONVERSATIONS, TEMPLATES, TOOLS
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from plait.errors import ConfigError, ModelFileError, TemplateError
from plait.text import ChatTemplate, Tokenizer

_VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}


def _hugging_face(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """What transformers renders; it raises an error of jinja2 or of Python for what it refuses."""
    rendered, _ = render_jinja_template([messages], chat_template=source, **options)
    return rendered[0]


def _both(source: str, messages: list[dict[str, Any]], **options: Any) -> tuple[str | None, str | None]:
    """Both renderings; None for a refusal."""
    try:
        theirs = _hugging_face(source, messages, **_VARIABLES, **options)
    except (jinja2.TemplateError, TypeError):
        theirs = None
    try:
        ours = ChatTemplate(source, variables=_VARIABLES).render(messages, **options)
    except TemplateError:
        ours = None
    return ours, theirs


@pytest.mark.parametrize(("style", "name"), list(itertools.product(TEMPLATES, CONVERSATIONS)))
def test_renderings_equal_hugging_face(style: str, name: str) -> None:
    for prompt, tools in itertools.product([True, False], [None, TOOLS]):
        ours, theirs = _both(TEMPLATES[style], CONVERSATIONS[name], add_generation_prompt=prompt, tools=tools)
        assert ours == theirs


def test_most_renderings_are_not_refusals() -> None:
    """The comparison above would hold for templates that refuse everything."""
    rendered = [_both(source, CONVERSATIONS["many"])[0] for source in TEMPLATES.values()]
    assert all("Fine, thanks." in text or "FinE, thanks." in text for text in rendered if text)
    assert None not in rendered


# Python counts U+001C to U+001F as white space, Unicode and minijinja do not.
_CONTENTS = st.text(st.characters(codec="utf-8", exclude_characters="\x1c\x1d\x1e\x1f"), max_size=20)


@settings(max_examples=100, deadline=None)
@given(
    style=st.sampled_from(sorted(TEMPLATES)),
    contents=st.lists(_CONTENTS, min_size=1, max_size=4),
    system=st.none() | _CONTENTS,
)
def test_any_content_is_rendered_alike(style: str, contents: list[str], system: str | None) -> None:
    roles = itertools.cycle(["user", "assistant"])
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    ours, theirs = _both(TEMPLATES[style], messages, add_generation_prompt=True)
    assert ours == theirs


@pytest.mark.model
def test_smollm2(smollm2_metadata: Mapping[str, Any], smollm2_tokenizer: Tokenizer) -> None:
    template = ChatTemplate.from_gguf(smollm2_metadata)
    assert template.variables["eos_token"] == "<|im_end|>"
    for messages in CONVERSATIONS.values():
        if all(isinstance(message["content"], str) for message in messages):
            assert template.render(messages) == _hugging_face(
                template.source, messages, add_generation_prompt=True
            )
    text = template.render([{"role": "user", "content": "Hi"}])
    ids = smollm2_tokenizer.encode(text, parse_special=True)
    assert ids[0] == smollm2_tokenizer.id_of("<|im_start|>")
    assert smollm2_tokenizer.decode(ids, skip_special=False) == text


@pytest.mark.model
def test_a_model_without_template_says_so(gemma3_metadata: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"no chat template.*ChatTemplate\.plain"):
        ChatTemplate.from_gguf(gemma3_metadata)
    with pytest.raises(ConfigError, match="no chat template"):
        ChatTemplate.from_config({"bos_token": "<s>"})


def test_plain_lines() -> None:
    messages = CONVERSATIONS["system"]
    expected = "system: Be brief.\n\nuser: Why?\nassistant: Because.\nuser: Oh\nassistant:"
    assert ChatTemplate.plain().render(messages) == expected
    assert ChatTemplate.plain().render(messages[:2], add_generation_prompt=False) == (
        "system: Be brief.\n\nuser: Why?\n"
    )


def test_variables_and_special_tokens_reach_the_template() -> None:
    config = {"chat_template": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ mood }}", "eos_token": "E"}
    template = ChatTemplate.from_config({**config, "bos_token": {"content": "B"}})
    assert template.render(CONVERSATIONS["one"]) == "BE"
    assert template.render(CONVERSATIONS["one"], mood="!", eos_token="e") == "Be!"
    assert ChatTemplate.from_config(config, "own").render(CONVERSATIONS["one"]) == "own"


def test_templates_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        ChatTemplate.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"chat_template": "old {{ bos_token }}", "bos_token": "B"}'
    )
    assert ChatTemplate.from_folder(tmp_path).render(CONVERSATIONS["one"]) == "old B"
    (tmp_path / "chat_template.jinja").write_text("né {{ bos_token }}", encoding="utf-8")
    assert ChatTemplate.from_folder(tmp_path).render(CONVERSATIONS["one"]) == "né B"
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ModelFileError, match="not JSON"):
        ChatTemplate.from_folder(tmp_path)


def test_a_template_of_its_own_for_tools() -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    template = ChatTemplate.from_config({"chat_template": named})
    assert template.render(CONVERSATIONS["one"]) == "plain"
    assert template.render(CONVERSATIONS["one"], tools=[]) == "plain"
    assert template.render(CONVERSATIONS["one"], tools=TOOLS) == "tools"


def test_the_time() -> None:
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}")
    before = datetime.datetime.now().strftime("%Y-%m-%d")
    rendered = template.render(CONVERSATIONS["one"])
    assert rendered in (before, datetime.datetime.now().strftime("%Y-%m-%d"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Only users, please.') }}", "The chat template failed: Only users, please."),
        ("{% if %}", r"syntax error.*\(in chat template:1\)"),
        ("{{ nothing.role }}", "`nothing` is undefined"),
        ("{{ messages[0].role.launch() }}", "no method named launch"),
        ("{{ 'a' + 1 }}", "operator on unsupported types string and number"),
        ("{% include 'other' %}", "non-existing template 'other'"),
        ("{{ messages | unheard }}", "filter unheard is unknown"),
    ],
)
def test_failures_carry_the_reason(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(source).render(CONVERSATIONS["one"])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one mapping"),
        ("Hello", "Messages must be a list"),
        ({"role": "user", "content": "x"}, "Messages must be a list"),
        (["Hello"], "Message 0 must be a mapping. Got str"),
        ([{"content": "x"}], "Message 0 must have a role that is text. Got None"),
        ([{"role": 1, "content": "x"}], "role that is text. Got 1"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], "Message 1 must have content.*Got no content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content that is text. Got list"),
        ([{"role": "user", "content": None, "tool_calls": []}], "Got no content"),
        ([{"role": "user", "content": "\ud800"}], "surrogates not allowed"),
        ([{"role": "user", "content": "x", "extra": object()}], "object is not JSON serializable"),
    ],
)
def test_wrong_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChatTemplate.plain().render(messages)


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": "x", "list": [1]}]
    assert ChatTemplate("{{ messages[0].list.append(2) }}{{ messages.pop() }}").render(messages)
    assert messages == [{"role": "user", "content": "x", "list": [1]}]


def test_sources_are_bounded_text() -> None:
    with pytest.raises(TemplateError, match=r"at most 262144 characters\. Got 262145"):
        ChatTemplate(" " * 262145)
    with pytest.raises(TemplateError, match=r"must be text\. Got int"):
        ChatTemplate.from_config({"chat_template": 3})
    with pytest.raises(TemplateError, match=r"must be text\. Got list"):
        ChatTemplate("", tool_source=[])  # type: ignore[arg-type]
