"""The chat template of a tokenizer: the Jinja text that makes one text of a conversation."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moe_lpr.data.manifest import Manifest
from megatron_moe_lpr.data.tokenizer_settings import CONFIG, SPECIAL_TOKENS
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import abbreviated, read_json

TEMPLATE_FILE = "chat_template.jinja"
DEFAULT, TOOL_USE = "default", "tool_use"
"""Names of templates in a tokenizer that has several; transformers uses the second for conversations with tools."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """One or several named templates, and the variables that a tokenizer gives them."""

    source: str
    """The file, for messages."""
    texts: Mapping[str, str]
    """Jinja text by name; DEFAULT is always there."""
    special_tokens: Mapping[str, str]
    """The tokens that templates refer to by their role: bos_token, eos_token and others."""

    @property
    def fingerprint(self) -> str:
        """sha256 in hex of the texts and special tokens, which decide how a conversation is written."""
        content = json.dumps([dict(self.texts), dict(self.special_tokens)], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(content.encode("ascii")).hexdigest()

    def text(self, has_tools: bool) -> str:
        """Return the template for a conversation with or without tools."""
        return self.texts.get(TOOL_USE, self.texts[DEFAULT]) if has_tools else self.texts[DEFAULT]


def read_chat_template(directory: Path, file: str | Path | None = None) -> ChatTemplate | None:
    """Read a tokenizer's chat template; None if it has none.

    Args:
        directory: with the tokenizer's files. chat_template.jinja precedes chat_template of tokenizer_config.json, as
            in transformers.
        file: a template to use in its place, in Jinja.

    Raises:
        UserError: a file cannot be read or holds no template.
    """
    roles = _special_tokens(directory)
    own = Path(file) if file is not None else directory / TEMPLATE_FILE
    if file is not None or own.is_file():
        return ChatTemplate(str(own), {DEFAULT: _read_text(own)}, roles)
    config = directory / CONFIG
    value = read_json(config).get("chat_template") if config.is_file() else None
    if value is None:
        return None
    return ChatTemplate(str(config), _named_texts(value, config), roles)


def template_note(manifests: Mapping[str, Manifest], directory: Path) -> str | None:
    """Return a note about conversations that were written with another chat template than a tokenizer's own.

    Args:
        manifests: of the datasets, by prefix.
        directory: with the tokenizer's files; one without a template gives no note.
    """
    written = {prefix: manifest.chat_template for prefix, manifest in manifests.items() if manifest.chat_template}
    # Text needs no template, and so none that can be read.
    own = read_chat_template(directory) if written else None
    for prefix, fingerprint in written.items():
        if own is not None and fingerprint != own.fingerprint:
            return (
                f"{prefix}: its conversations were written with another chat template than {own.source}; an export "
                "will have the latter"
            )
    return None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: the chat template cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a chat template, which is UTF-8 text in Jinja") from None


def _named_texts(value: Any, config: Path) -> dict[str, str]:
    """Return the templates of tokenizer_config.json: one text, or a list of `{"name": ..., "template": ...}`."""
    if isinstance(value, str):
        return {DEFAULT: value}
    rows = value if isinstance(value, list) else []
    named = {row.get("name"): row.get("template") for row in rows if isinstance(row, dict)}
    texts = {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}
    if DEFAULT not in texts:
        raise UserError(f"{config}: chat_template holds {abbreviated(value)}, no template; pass --chat-template FILE")
    return texts


def _special_tokens(directory: Path) -> dict[str, str]:
    """Return bos_token, eos_token and the other roles with one token; tokenizer_config.json takes precedence."""
    roles: dict[str, str] = {}
    for name in (SPECIAL_TOKENS, CONFIG):
        file = directory / name
        for role, token in (read_json(file) if file.is_file() else {}).items():
            content = token.get("content") if isinstance(token, dict) else token
            if role.endswith("_token") and isinstance(content, str):
                roles[role] = content
    return roles
