"""The chat formats as Jinja templates, for folders without one; tests compare them with `chat`."""

from __future__ import annotations

import json
from collections.abc import Mapping

_SYSTEM = """\
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set said = messages[1:] %}
{%- else %}{% set system = none %}{% set said = messages %}{% endif %}
"""

_CHATML = (
    _SYSTEM
    + r"""
{%- if system is not none %}{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}
{%- elif OPENING %}{{ '<|im_start|>system\nSPELLED<|im_end|>\n' }}{% endif %}
{%- for message in said %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
)

_QWEN3 = (
    _SYSTEM
    + r"""
{%- if system is not none %}{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}
{%- elif OPENING %}{{ '<|im_start|>system\nSPELLED<|im_end|>\n' }}{% endif %}
{%- set last = namespace(question=said | length) %}
{%- for message in said %}{% set text = message['content'] %}
{%- set of_tools = text.startswith('<tool_response>') and text.endswith('</tool_response>') %}
{%- if message['role'] == 'user' and not of_tools %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in said %}{% set text, reasoning = message['content'], '' %}
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}
{%- if '</think>' in text %}
{%- set reasoning = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set text = text.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{%- if loop.index0 > last.question and (loop.last or reasoning) %}
{{- '<think>\n' + reasoning + '\n</think>\n\n' }}
{%- endif %}
{%- endif %}
{{- text + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if not (enable_thinking is defined and enable_thinking) %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""
)


def _marked_inst(space: str, answer: str) -> str:
    """`space` follows [INST]; `answer` is an expression."""
    rest = r"""
{{- bos_token }}
{%- for message in said %}
{%- if message['role'] == 'user' %}
{{- '[INST]SPACE' + (system + '\n\n' if system is not none and loop.last else '') }}
{{- message['content'] + '[/INST]' }}
{%- else %}{{ ANSWER + eos_token }}{% endif %}
{%- endfor %}"""
    return _SYSTEM + rest.replace("SPACE", space).replace("ANSWER", answer)


_TEMPLATES: Mapping[str, str] = {
    "turns": _SYSTEM
    + r"""
{{- bos_token }}
{%- for message in said %}
{%- if message['role'] == 'user' %}
{{- '<user>' + (system + '\n\n' if system and loop.first else '') + message['content'] + '<model>' }}
{%- else %}{{ message['content'] + eos_token }}{% endif %}
{%- endfor %}""",
    "gemma": _SYSTEM
    + r"""
{{- bos_token }}
{%- for message in said %}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' }}
{{- (system + '\n\n' if system is not none and loop.first else '') + message['content'] | trim }}
{{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
    "llama3": _SYSTEM
    + r"""
{{- bos_token }}
{%- if system is not none or OPENING %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' + OPENING + (system or '') | trim + '<|eot_id|>' }}
{%- endif %}
{%- for message in said %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    "chatml": _CHATML,
    "qwen3": _QWEN3,
    "llama2": _SYSTEM
    + r"""
{%- for message in said %}
{%- if message['role'] == 'user' %}
{%- set before = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if system is not none and loop.first else '' %}
{{- bos_token + ' [INST] ' + (before + message['content']) | trim + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}
{%- endfor %}""",
    "mistral": _SYSTEM
    + r"""
{{- bos_token }}
{%- for message in said %}
{%- if message['role'] == 'user' %}
{{- ' [INST] ' + (system + '\n\n' if system is not none and loop.first else '') + message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}
{%- endfor %}""",
    "mistral3": _marked_inst(" ", "' ' + message['content'] | trim"),
    "ministral": _marked_inst("", "' ' + message['content'] | trim"),
    "nemo": _marked_inst("", "message['content']"),
}


def template_of(chat: str, opening: str) -> str:
    """The template of a format in `chat.FORMATS`, with the opening of `chat.choose`; "" for plain."""
    template = _TEMPLATES.get(chat, "")
    return template.replace("OPENING", json.dumps(opening)).replace("SPELLED", opening)
