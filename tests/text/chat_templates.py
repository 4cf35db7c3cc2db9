"""Chat templates in the styles of well-known model families, and conversations to render."""

from __future__ import annotations

from typing import Any

__all__ = ["CONVERSATIONS", "TEMPLATES", "TOOLS"]

TEMPLATES = {
    "chatml": """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""",
    "llama-2": """\
{% if messages[0]['role'] == 'system' %}
  {% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}
{% else %}
  {% set loop_messages = messages %}{% set system_message = false %}
{% endif %}
{% for message in loop_messages %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Roles must alternate user/assistant, starting with the user!') }}
  {% endif %}
  {% if loop.index0 == 0 and system_message != false %}
    {% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
  {% else %}
    {% set content = message['content'] %}
  {% endif %}
  {% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
  {%- elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}
  {%- endif %}
{% endfor %}
""",
    "llama-3": """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message and message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{ raise_exception("Only one tool call at once!") }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' ~ call.name ~ '", "parameters": ' ~ call.arguments | tojson ~ '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
""",
    "mistral": """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if message.role in ["user", "assistant"] %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val | tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"] + eos_token }}
    {%- else %}{{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
""",
    "phi-3": """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>
' + message['content'] + '<|end|>
' }}{% elif message['role'] == 'user' %}{{ '<|user|>
' + message['content'] + '<|end|>
' }}{% else %}{{ '<|assistant|>
' + message['content'] + '<|end|>
' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}""",
    "zephyr": """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "gemma": """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}{%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim if item.type == 'text' }}{%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\\n'}}{%- endif -%}
""",
    "reasoning": """\
{%- macro turn(role, text, end='<|im_end|>') -%}{{ '<|im_start|>' ~ role ~ '\\n' ~ text ~ end ~ '\\n' }}{%- endmacro -%}
{%- set ns = namespace(last_query=messages | length - 1, searching=true) -%}
{%- for message in messages[::-1] -%}
    {%- set index = messages | length - 1 - loop.index0 -%}
    {%- if ns.searching and message.role == 'user' and not message.content.startswith('<tool_response>') -%}
        {%- set ns.searching = false -%}{%- set ns.last_query = index -%}
    {%- endif -%}
{%- endfor -%}
{%- if tools -%}
    {{- '# Tools\\n' }}{% for tool in tools %}{{ '\\n' }}{{ tool | tojson(indent=2) }}{% endfor %}{{ '\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}{{ turn('user', '<tool_response>' ~ message.content ~ '</tool_response>') }}{%- continue -%}{%- endif -%}
    {%- set content = message.content or '' -%}
    {%- if message.role == 'assistant' and '</think>' in content -%}
        {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
        {%- if loop.index0 > ns.last_query -%}{% set content = '<think>' ~ reasoning ~ '</think>' ~ content %}{%- endif -%}
    {%- endif -%}
    {%- if message.role == 'assistant' -%}{% generation %}{{ turn(message.role, content) }}{% endgeneration %}
    {%- else -%}{{ turn(message.role, content) }}{%- endif -%}
    {%- for call in message.tool_calls or [] -%}
        {{- '<tool_call>' ~ (call.function if call.function is defined else call) | tojson ~ '</tool_call>' -}}
    {%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif -%}
{%- endif -%}
""",
    "python-methods": """\
{%- for message in messages -%}
    {{ loop.index }}/{{ loop.length }} {{ message.get('name', 'nobody') }} {{ message.keys() | list | sort | join(',') }}
    {{ message.role.upper() }}|{{ message.role.title() }}|{{ message.role.capitalize() }}|{{ message.role[:1] }}|{{ message.role[::-1] }}
    {%- set words = message.content.split() -%}
    {{ words | length }} {{ words | first | default('none', true) }} {{ words[-1:] | tojson }} {{ words | map('lower') | unique | list | tojson }}
    {{ message.content.replace('e', 'E') | replace('\\n', '/') }} {{ message.content.count('a') }} {{ message.content.find('z') }}
    {{ 'yes' if message.content is sequence and message is mapping and words is iterable else 'no' }}
    {% if loop.index == 3 %}{% break %}{% endif %}
{%- endfor -%}
{{ [true, false, none, 1, 2.5, 'it''s'|string if false else "it's"] }} {{ {'a': 1, 'b': [none, 'x']} }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 2 ** 5 }} {{ -7 % 3 }}
{{ messages | map(attribute='role') | list }} {{ range(3) | sum }} {{ [3, 1, 2] | sort | reverse | list }} {{ dict(a=1).items() | list }}
{{ messages | selectattr('role', 'in', ['user', 'tool']) | list | length }} {{ messages | groupby('role') | length }} {{ 'a-b'.split('-', 1) }}
{% filter upper %}shout{% endfilter %} {% set block %}[{{ messages[0].role }}]{% endset %}{{ block | indent(2, true) }}
""",
}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather <b>now</b> & 'later' in a \"city\", é 😀.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": None}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "time", "parameters": {"strict": True, "limit": 1.5}}},
]


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [_user("Hello")],
    "many": [
        _user("Hello"),
        _assistant("Hi! How are you?"),
        _user("Fine, thanks."),
        _assistant("Good."),
        _user("Bye"),
    ],
    "system": [
        {"role": "system", "content": "Be brief.\n"},
        _user("Why?"),
        _assistant("Because."),
        _user("Oh"),
    ],
    "unicode": [
        _user("Zażółć 你好 👩‍👩‍👧 \u2028 é\u0301 \x00 {{ messages }} {% raw %} <b>&amp;'\"</b>"),
        _assistant("‮ok\r\n"),
    ],
    "spaces": [_user("  \n two  spaces \t\n"), _assistant(""), _user("\n")],
    "thinking": [
        _user("2+2?"),
        _assistant("<think>\nfour\n</think>\n\n4"),
        _user("sure?"),
        _assistant("<think>x</think>yes"),
    ],
    "tools": [
        _user("Weather in Łódź?"),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "type": "function",
                    "function": {"name": "weather", "arguments": {"city": "Łódź", "n": [1, None, True]}},
                }
            ],
        },
        {"role": "tool", "name": "weather", "content": '{"t": 5}'},
        _assistant("Five degrees."),
        _user("Thanks"),
    ],
    "assistant first": [_assistant("I begin."), _user("No.")],
    "two users": [_user("a"), _user("b")],
    "only system": [{"role": "system", "content": "Nothing else."}],
    "strange role": [{"role": "ipython", "content": "1"}],
}
