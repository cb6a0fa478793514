"""What the model is asked to continue: prompts and conversations, from flags, files and standard input."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.generation.options import PromptOptions


@dataclasses.dataclass(frozen=True)
class Request:
    """A text to continue, or a conversation to answer in."""

    place: str
    """Where it comes from, for messages."""
    text: str = ""
    messages: list[dict[str, Any]] | None = None
    """The conversation; None: `text` is continued as it is."""
    tools: list[Any] | None = None


def is_interactive(options: PromptOptions) -> bool:
    """Return whether the user converses in a terminal."""
    given = (options.prompt, options.prompts, options.messages)
    return options.chat and all(value is None for value in given) and sys.stdin is not None and sys.stdin.isatty()


def read_requests(options: PromptOptions) -> list[Request]:
    """Read all prompts. Raises UserError: there are none, or a file is not what its flag expects."""
    if options.messages is not None:
        return [_conversation(_json(_text(options.messages), str(options.messages)), str(options.messages))]
    if options.prompts is not None:
        return _from_file(options.prompts, options.chat)
    if options.prompt is not None:
        return [_spoken(_whole(options.prompt, "--prompt"), "--prompt", options.chat)]
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("give --prompt, --prompts or --messages, a text on standard input, or --chat to converse")
    return [_spoken(_decoded(sys.stdin.buffer.read(), "standard input"), "standard input", options.chat)]


def _from_file(file: Path, chat: bool) -> list[Request]:
    lines = [(number, line) for number, line in enumerate(_text(file).split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"--prompts {file}: holds no prompt")
    is_json = file.suffix == ".jsonl"
    return [
        _from_record(_json(line, f"{file}:{number}"), f"{file}:{number}", chat)
        if is_json
        else _spoken(line.rstrip("\r"), f"{file}:{number}", chat)
        for number, line in lines
    ]


def _from_record(record: Any, place: str, chat: bool) -> Request:
    if isinstance(record, dict) and isinstance(record.get("prompt"), str) and "messages" not in record:
        return _spoken(_whole(record["prompt"], place), place, chat)
    if isinstance(record, list) or (isinstance(record, dict) and "messages" in record):
        return _conversation(record, place)
    raise UserError(f'{place}: expected {{"prompt": "..."}} or {{"messages": [...]}}')


def _spoken(text: str, place: str, chat: bool) -> Request:
    return Request(place, messages=[{"role": "user", "content": text}]) if chat else Request(place, text)


def _conversation(record: Any, place: str) -> Request:
    messages = record.get("messages") if isinstance(record, dict) else record
    tools = record.get("tools") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{place}: expected a list of messages, or an object with one as `messages`")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f'{place}: message {number} is not {{"role": "...", "content": "..."}}')
        if not isinstance(message.get("content"), str | list | None):
            raise UserError(f"{place}: the content of message {number} is neither text nor a list of parts")
        if message.get("content") is None and message["role"] != "assistant":
            raise UserError(f"{place}: message {number} has no content; a template would write its absence as a word")
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{place}: `tools` is not a list")
    return Request(place, messages=messages, tools=tools)


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error})") from None


def _text(file: Path) -> str:
    return _decoded(file.read_bytes(), str(file)).removeprefix("\ufeff")


def _decoded(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not a text in UTF-8 (byte {error.start})") from None


def _whole(text: str, place: str) -> str:
    """Check that a text is valid Unicode: words of a command line and JSON may hold single surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{place}: not a text in UTF-8") from None
    return text
