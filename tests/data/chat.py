"""Chat templates that behave like those of known models, with `{% generation %}` marks, and a tokenizer for them."""

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<|start_header_id|>"]
SPECIAL += ["<|end_header_id|>", "<|eot_id|>", "[TOOL_CALLS]"]
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
"""Added tokens that are not special, as in Qwen3's tokenizer."""

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content | trim }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ message.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set begin = 1 if messages[0].role == 'system' else 0 %}"
    "{% for message in messages[begin:] %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}[INST] "
    "{% if begin and loop.last %}{{ messages[0].content }}\n\n{% endif %}{{ message.content }} [/INST]"
    "{% else %}{% generation %}{{ ' ' + message.content | trim + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
"""The system message is written before the last question, as in some of Mistral's: earlier turns change."""
QWEN3 = (
    "{% set last = namespace(query=0) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set last.query = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ message.content }}\n</tool_response>"
    "<|im_end|>\n"
    "{% elif message.role != 'assistant' %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% else %}{% set content = message.content or '' %}{% set reasoning = '' %}"
    "{% if '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n{% generation %}"
    "{% if loop.index0 > last.query and (loop.last or reasoning) %}<think>\n{{ reasoning }}\n</think>\n\n{% endif %}"
    "{{ content }}"
    "{% for call in message.tool_calls or [] %}{% if content or not loop.first %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>"
    "{% endfor %}<|im_end|>{% endgeneration %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The reasoning of answers before the last question is left out, and the last answer gets an empty one."""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "qwen3": QWEN3}


def without_generation(template: str) -> str:
    """The template without its marks."""
    return re.sub(r"\{%-? (end)?generation -?%\}", "", template)


def turns(*contents: Any) -> list[dict]:
    """Questions and answers in turn; a dict is a whole message."""
    roles = ("user", "assistant")
    return [
        one if isinstance(one, dict) else {"role": roles[number % 2], "content": one}
        for number, one in enumerate(contents)
    ]


def make_chat_tokenizer(base: Path, directory: Path, template: str | None) -> Path:
    """The tokenizer of `base` with the templates' special tokens, and a template."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def write_conversations(path: Path, conversations: list) -> Path:
    """One JSON line a conversation; lists become {"messages": ...}."""
    rows = [one if isinstance(one, dict) else {"messages": one} for one in conversations]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
