"""`extension.json` of an extended tokenizer (`moe-lpr extend-tokenizer`): the new tokens and what they replace."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import is_integer, read_json, required_int, write_json
from megatron_moe_lpr.program import command

EXTENSION_FILE = "extension.json"
FORMAT = 1
MAX_ID = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class GuardedLanguage:
    """Documents of a guarded language that the tool read, and how many of them get a new token."""

    documents: int
    changed: int


@dataclasses.dataclass(frozen=True)
class TokenizerExtension:
    """Tokens that were added to a base tokenizer.

    Attributes:
        base_vocab_size: rows of the base model's embedding matrix; the new ids begin here.
        new_tokens: number of new ids.
        base_tokenizer_fingerprint: fingerprint of the base tokenizer, as in the manifests of its datasets.
        tokenizer_fingerprint: fingerprint of the extended tokenizer.
        guarded: by language.
        pieces: for each new token, in the order of ids, the ids below `base_vocab_size` that the base tokenizer gives.
        earlier: extensions that the base tokenizer itself has, oldest first.
    """

    base_vocab_size: int
    new_tokens: int
    base_tokenizer_fingerprint: str
    tokenizer_fingerprint: str
    guarded: Mapping[str, GuardedLanguage]
    pieces: list[list[int]]
    earlier: list["TokenizerExtension"] = dataclasses.field(default_factory=list)

    @property
    def vocab_size(self) -> int:
        """Number of ids, old and new."""
        return self.base_vocab_size + self.new_tokens

    def as_json(self) -> dict[str, Any]:
        """Return the content of `EXTENSION_FILE`."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def write(self, directory: Path) -> None:
        """Write `EXTENSION_FILE` into the directory of the extended tokenizer."""
        write_json(self.as_json(), directory / EXTENSION_FILE)


def read_extension(directory: Path) -> TokenizerExtension | None:
    """Read `EXTENSION_FILE` of a tokenizer's directory; None if its tokenizer has not been extended.

    Raises:
        UserError: the file is damaged, or of a later version of this package.
    """
    path = directory / EXTENSION_FILE
    return parse_extension(read_json(path), str(path)) if path.is_file() else None


def parse_extension(fields: Mapping[str, Any], source: str) -> TokenizerExtension:
    """Check the content of an `EXTENSION_FILE`; `source` names it in messages. Raises UserError."""
    if fields.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{source}: written by a later version; update this package or run {command('extend-tokenizer')}"
        )
    rows = required_int(fields, "base_vocab_size", source, 1, MAX_ID)
    new = required_int(fields, "new_tokens", source, 1, MAX_ID - rows)
    if not _is_whole(fields, rows, new):
        raise UserError(f"{source}: damaged: not what {command('extend-tokenizer')} writes; copy it again")
    return TokenizerExtension(
        rows,
        new,
        fields["base_tokenizer_fingerprint"],
        fields["tokenizer_fingerprint"],
        {language: GuardedLanguage(one["documents"], one["changed"]) for language, one in fields["guarded"].items()},
        fields["pieces"],
        [parse_extension(one, source) for one in fields.get("earlier", [])],
    )


def _is_whole(fields: Mapping[str, Any], rows: int, new: int) -> bool:
    guarded, pieces, earlier = fields.get("guarded"), fields.get("pieces"), fields.get("earlier", [])
    return (
        all(isinstance(fields.get(f"{name}tokenizer_fingerprint"), str) for name in ("base_", ""))
        and isinstance(guarded, dict)
        and all(map(_is_guarded, guarded.values()))
        and isinstance(pieces, list)
        and len(pieces) == new
        and all(isinstance(one, list) and one and all(is_integer(each, 0, rows - 1) for each in one) for one in pieces)
        and isinstance(earlier, list)
        and all(isinstance(one, dict) for one in earlier)
    )


def _is_guarded(value: object) -> bool:
    return (
        isinstance(value, dict)
        and is_integer(value.get("documents"))
        and is_integer(value.get("changed"), 0, value["documents"])
    )
