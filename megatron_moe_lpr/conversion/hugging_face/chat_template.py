"""What a tokenizer's chat template does, found by rendering it."""

from pathlib import Path
from typing import Any

from megatron_moe_lpr.data.tokenizer_settings import eos_ids

ANSWER = "Xylophone"
"""An answer that no template contains."""


def answer_ends(tokenizer: Any) -> frozenset[int]:
    """Return the token that a template puts behind an answer; empty without a template, or where it puts none.

    Args:
        tokenizer: of transformers.
    """
    if not tokenizer.chat_template:
        return frozenset()
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template with wishes of its own raises jinja's errors, or Python's
        return frozenset()
    rest = text[text.rfind(ANSWER) + len(ANSWER) :].lstrip() if ANSWER in text else ""
    known = tokenizer.get_added_vocab() | dict(
        zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    )
    found = next((known[token] for token in sorted(known, key=len)[::-1] if token and rest.startswith(token)), None)
    return frozenset() if found is None else frozenset([found])


def is_trained_on_template(directory: Path, tokenizer: Any) -> bool:
    """Return whether a model's own settings end a text at the token that its template puts behind an answer.

    Those of instruct models do (`eos_token_id` of generation_config.json, else of config.json). Base models that carry
    a template, as Qwen2.5's and Qwen3's, end at another token: nothing has taught them the template.
    """
    declared = eos_ids(directory)
    return bool(declared and answer_ends(tokenizer) & set(declared[0]))
