"""Small tokenizers of each published family's kind, and the chat templates published with the models.

The templates are those of the model repositories but for their branches for tools and images, and conditions that
only those need.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
from typing import Any

import sentencepiece

CORPUS = [
    "the Nile is long, the Amazon is wide. You are a helpful assistant, created by people.",
    "user model assistant system rivers 0 1 2 3 4 5 6 7 8 9 10 42 123 1803",
    "What is the capital of France? It's Paris.\n\nAnd of Peru?\n- Lima",
] * 30


def sentencepiece_model(
    *, control: tuple[str, ...] = (), symbols: tuple[str, ...] = (), **options: Any
) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        control_symbols=list(control),
        user_defined_symbols=list(symbols),
        minloglevel=2,
        **{"vocab_size": 340 + len(control) + len(symbols), "byte_fallback": True} | options,
    )
    return model.getvalue()


@functools.cache
def gemma() -> bytes:
    """As Gemma's: markers are symbols that text can spell, lines and spaces have pieces."""
    unused = tuple(f"<unused{n}>" for n in range(9))
    symbols = ("<mask>", *unused, "<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "<table>")
    ids: dict[str, Any] = dict(
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>"
    )
    return sentencepiece_model(symbols=symbols, add_dummy_prefix=False, **ids)


@functools.cache
def llama2() -> bytes:
    return sentencepiece_model()


@functools.cache
def mistral3() -> bytes:
    return sentencepiece_model(control=("[INST]", "[/INST]", *(f"[control_{n}]" for n in range(8, 20))))


_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3_MARKS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *(f"<|reserved_special_token_{n}|>" for n in range(1, 12)),
)
QWEN_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>")
QWEN_TEXT = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<|fim_prefix|>")
"""Not declared special, in Qwen's file."""


def _byte_level(words: str, marks: tuple[str, ...], texts: tuple[str, ...], nfc: bool) -> Any:
    tokenizers: Any = importlib.import_module("tokenizers")
    pre, models = tokenizers.pre_tokenizers, tokenizers.models
    built = tokenizers.Tokenizer(models.BPE(byte_fallback=False, ignore_merges=not nfc))
    built.normalizer = tokenizers.normalizers.NFC() if nfc else None
    split = pre.Split(tokenizers.Regex(words), behavior="isolated")
    built.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    built.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
    )
    built.train_from_iterator(CORPUS, trainer)
    built.add_special_tokens([tokenizers.AddedToken(mark, special=True, normalized=False) for mark in marks])
    built.add_tokens([tokenizers.AddedToken(text, special=False, normalized=False) for text in texts])
    return built


@functools.cache
def llama3() -> bytes:
    """A tokenizer.json as Llama 3's: digits in threes, a beginning of text by its post-processor."""
    tokenizers: Any = importlib.import_module("tokenizers")
    built = _byte_level(_LLAMA3_WORDS, LLAMA3_MARKS, (), nfc=False)
    begin = "<|begin_of_text|>"
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, built.token_to_id(begin))]
    )
    return built.to_str().encode()


@functools.cache
def qwen() -> bytes:
    """A tokenizer.json as Qwen's: NFC, digits one by one, no beginning of text, markup that is not special."""
    words = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
    return _byte_level(words, QWEN_MARKS, QWEN_TEXT, nfc=True).to_str().encode()


@functools.cache
def nemo() -> bytes:
    """A tokenizer.json as Mistral Nemo's, with free ids of its own names."""
    marks = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>", *(f"<SPECIAL_{n}>" for n in range(14, 24)))
    return _byte_level(_LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"), marks, (), nfc=False).to_str().encode()


def folder(template: str = "", *, rows: int = 0, **config: Any) -> dict[str, bytes]:
    """What stands beside a tokenizer."""
    files: dict[str, Any] = {"tokenizer_config.json": config}
    if template:
        config["chat_template"] = template
    if rows:
        files["config.json"] = {"vocab_size": rows}
    return {name: json.dumps(told).encode() for name, told in files.items()}


GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

QWEN25 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != "system" or not loop.first %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>') \
and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content, thought = message.content, '' %}
        {%- if '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
            {%- set thought = message.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or thought) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\n' + system_message + "
    "'\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

_MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if WHERE and system_message is defined %}
            {{- BEFORE + system_message + "\n\n" + message["content"] + AFTER }}
        {%- else %}
            {{- BEFORE + message["content"] + AFTER }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""
MISTRAL1 = (
    _MISTRAL.replace("WHERE", "loop.first").replace("BEFORE", '" [INST] "').replace("AFTER", '" [/INST]"')
)
MISTRAL3 = _MISTRAL.replace("WHERE", "loop.last").replace("BEFORE", '"[INST] "').replace("AFTER", '"[/INST]"')
MINISTRAL = MISTRAL3.replace('"[INST] "', '"[INST]"')
NEMO = MINISTRAL.replace('" " + message["content"]|trim', 'message["content"]')
