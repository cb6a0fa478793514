"""Read a JSON object as a conversation: `messages`, or `prompt` and `completion` as lists of messages or as texts."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_moe_lpr.data.preparation.documents import MALFORMED, DocumentError
from megatron_moe_lpr.files.json_files import abbreviated

MESSAGES, PROMPT, COMPLETION, TOOLS, VARIABLES = "messages", "prompt", "completion", "tools", "chat_template_kwargs"
KEYS = (MESSAGES, PROMPT, COMPLETION, TOOLS, VARIABLES)
"""JSON keys (or parquet columns) that are read, as TRL has them."""
ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
NO_MESSAGES = "no_messages"
NO_ANSWER = "no_answer"

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages, checked, and what a chat template gets with them."""

    messages: list[Message]
    first_counted: int = 0
    """Index of the first message whose answer may count in the loss: those before it are the prompt."""
    tools: list[Any] | None = None
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further variables of the template, such as enable_thinking."""

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant's messages that count in the loss."""
        numbers = range(self.first_counted, len(self.messages))
        return [number for number in numbers if self.messages[number]["role"] == ASSISTANT]


@dataclasses.dataclass(frozen=True)
class PromptCompletion:
    """A pair of texts without roles: no chat template is applied, and the completion counts in the loss."""

    prompt: str
    completion: str


def read_conversation(document: Mapping[str, Any], key: str = MESSAGES) -> Conversation | PromptCompletion:
    """Check a JSON object and return its conversation.

    Args:
        document: the object.
        key: JSON key of the messages.

    Raises:
        DocumentError: there is no conversation in it, or a message is not valid.
    """
    if document.get(key) is not None:
        messages, first = _messages(document[key], key), 0
    else:
        prompt, completion = document.get(PROMPT), document.get(COMPLETION)
        if isinstance(prompt, str) and isinstance(completion, str):
            if not completion:
                raise DocumentError(NO_ANSWER, "the completion is empty")
            return PromptCompletion(prompt, completion)
        if not (isinstance(prompt, list) and isinstance(completion, list)):
            known = ", ".join(list(document)[:8]) or "none"
            hint = f"no {key!r} (--json-key), nor {PROMPT!r} and {COMPLETION!r} of the same kind: it has {known}"
            raise DocumentError(NO_MESSAGES, hint)
        messages, first = [*_messages(prompt, PROMPT), *_messages(completion, COMPLETION)], len(prompt)
    variables = document.get(VARIABLES) or {}
    if not isinstance(variables, dict):
        raise DocumentError(MALFORMED, f"{VARIABLES!r} must be an object, not {abbreviated(variables)}")
    conversation = Conversation(messages, first, _tools(document.get(TOOLS)), variables)
    if not conversation.answers:
        raise DocumentError(NO_ANSWER, f"no message of the role {ASSISTANT!r} that could count in the loss")
    return conversation


def conversation_columns(present: Sequence[str], key: str) -> list[str]:
    """Return the columns of a parquet file that `read_conversation` reads; `key` alone if it has no conversations."""
    if key in present or not {PROMPT, COMPLETION} <= set(present):
        return [key, *(name for name in (TOOLS, VARIABLES) if name in present and key in present)]
    return [name for name in KEYS if name in present and name != MESSAGES]


def _messages(value: Any, key: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DocumentError(MALFORMED, f"{key!r} must be a list of messages, not {abbreviated(value)}")
    return [_message(one, f"message {number} of {key!r}") for number, one in enumerate(value, 1)]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise DocumentError(MALFORMED, f"{place}: not an object with role and content: {abbreviated(value)}")
    role, content, calls = value.get("role"), value.get("content"), value.get("tool_calls")
    if role not in ROLES:
        raise DocumentError(
            MALFORMED, f"{place}: the role {abbreviated(role)} is unknown; there are {', '.join(ROLES)}"
        )
    if calls and not (role == ASSISTANT and isinstance(calls, list) and all(isinstance(one, dict) for one in calls)):
        raise DocumentError(MALFORMED, f"{place}: tool_calls must be a list of objects in a message of the assistant")
    if not (_is_content(content) or (content is None and calls)):
        found = "no content" if content is None else f"its content is {abbreviated(content)}"
        raise DocumentError(MALFORMED, f"{place}: {found}; it must be a text or a list of parts of type text")
    # Absent and null mean the same, as in transformers: parquet files have every key in every message.
    return {name: part for name, part in value.items() if part is not None}


def _is_content(content: Any) -> bool:
    if isinstance(content, list):
        return bool(content) and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        )
    return isinstance(content, str)


def _tools(value: Any) -> list[Any] | None:
    """Return the tools; data sets that keep them in a column have them as a text of JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise DocumentError(MALFORMED, f"{TOOLS!r} is a text that is not JSON") from None
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise DocumentError(MALFORMED, f"{TOOLS!r} must be a list of objects, not {abbreviated(value)}")
    return value or None
