"""Read added tokens and the end-of-text token from the files beside a tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import is_integer, read_json, shown

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
MODEL_FILES = ("generation_config.json", "config.json")


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token recognised in a text before tokenization, as AddedToken of Hugging Face."""

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


def added_tokens(directory: Path) -> list[AddedToken]:
    """Return tokens of `added_tokens_decoder` in tokenizer_config.json and of added_tokens.json, by id.

    Tokens named by a role (eos_token, additional_special_tokens, ...) are special too.

    Raises:
        UserError: a file has invalid entries.
    """
    roles = _special_contents(directory)
    tokens: dict[int, AddedToken] = {}
    file = directory / ADDED_TOKENS
    for content, number in (read_json(file) if file.is_file() else {}).items():
        if not is_integer(number, 0, 2**31 - 1):
            raise UserError(f"{file}: the id of {content!r} cannot be {shown(number)}; copy the file again")
        tokens[number] = AddedToken(number, content, content in roles)
    config = directory / CONFIG
    decoder = _table(config).get("added_tokens_decoder") or {}
    for number, fields in decoder.items() if isinstance(decoder, dict) else ():
        if not (
            number.isdecimal()
            and len(number) < 10
            and isinstance(fields, dict)
            and isinstance(fields.get("content"), str)
        ):
            raise UserError(f"{config}: added_tokens_decoder holds {shown(number)}, no token; copy the file again")
        flags = {name: fields.get(name) is True for name in FLAGS}
        token = AddedToken(int(number), fields["content"], **flags)
        tokens[token.id] = dataclasses.replace(token, special=token.special or token.content in roles)
    return [tokens[number] for number in sorted(tokens)]


def _special_contents(directory: Path) -> set[str]:
    contents = set()
    for name in (CONFIG, SPECIAL_TOKENS):
        for role, value in _table(directory / name).items():
            values = value if isinstance(value, list) else [value]
            if role.endswith(("_token", "_special_tokens")):
                contents |= {text for text in map(_content, values) if isinstance(text, str)}
    return contents


def eos_token(directory: Path) -> tuple[str, Path] | None:
    """Return the end-of-sequence token and the file that names it; tokenizer_config.json takes precedence.

    Raises:
        UserError: a file names something that is not text.
    """
    for name in (CONFIG, SPECIAL_TOKENS):
        file = directory / name
        token = _content(_table(file).get("eos_token"))
        if token is not None and not isinstance(token, str):
            raise UserError(f"{file}: eos_token must be text, not {shown(token)}; correct it or pass --eod-token")
        if token is not None:
            return token, file
    return None


def eos_ids(directory: Path) -> tuple[list[int], Path] | None:
    """Return the ids that end a text for the model, and the file with them; generation_config.json takes precedence."""
    for name in MODEL_FILES:
        file = directory / name
        numbers = _table(file).get("eos_token_id")
        numbers = numbers if isinstance(numbers, list) else [numbers]
        if found := [number for number in numbers if is_integer(number)]:
            return found, file
    return None


def _table(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token
