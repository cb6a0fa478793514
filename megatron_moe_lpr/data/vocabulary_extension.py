"""A vocabulary extension: a tokenizer with new tokens for further languages, and its record `extension.json`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_moe_lpr.checkpoint.format.card import EarlierTokenizer
from megatron_moe_lpr.data.language_names import canonical_language, covered
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import abbreviated, is_integer, read_json

EXTENSION_FILE = "extension.json"
FORMAT = 1
MAX_TOKENS = (1 << 31) - 1
KEYS = {
    "format",
    "base_vocab_size",
    "new_tokens",
    "base_tokenizer_fingerprint",
    "tokenizer_fingerprint",
    "guarded",
    "pieces",
}
EARLIER = "earlier"


@dataclasses.dataclass(frozen=True)
class VocabularyExtension:
    """What `extension.json` records about the tokenizer beside it. Ids of old tokens are as before the extension."""

    base_vocab_size: int
    """Rows of the base model's embedding, and the id of the first new token."""
    base_fingerprint: str
    """Fingerprint of the tokenizer before the extension."""
    fingerprint: str
    """Fingerprint of the extended tokenizer."""
    guarded: dict[str, tuple[int, int]]
    """By guarded language: documents that were compared, and how many of them got other token ids."""
    pieces: list[list[int]]
    """For each new token, in the order of their ids, the old tokens that it replaces."""

    @property
    def new_tokens(self) -> int:
        """Number of new tokens."""
        return len(self.pieces)

    @property
    def end(self) -> int:
        """The id after the last new token's."""
        return self.base_vocab_size + len(self.pieces)

    @property
    def unchanged_languages(self) -> list[str]:
        """Guarded languages of which no compared document changed, by their canonical names, sorted."""
        sure = {canonical_language(name): True for name in self.guarded}
        for name, (documents, changed) in self.guarded.items():
            sure[canonical_language(name)] &= documents > 0 and changed == 0
        return sorted(name for name, is_unchanged in sure.items() if is_unchanged)


def tokenizers_before(extension: VocabularyExtension, earlier: Sequence[EarlierTokenizer]) -> list[EarlierTokenizer]:
    """Tokenizers whose datasets a model accepts after an extension, in some languages.

    Args:
        extension: the latest extension.
        earlier: those that the model accepted before it.
    """
    unchanged = extension.unchanged_languages
    still = [
        dataclasses.replace(one, unchanged=[name for name in one.unchanged if covered([name], unchanged)])
        for one in earlier
    ]
    return [*still, EarlierTokenizer(extension.base_fingerprint, unchanged)]


def read_extension(directory: Path) -> VocabularyExtension:
    """Read and check `extension.json` of an extended tokenizer.

    Raises:
        UserError: no such file, or a field is missing, unknown or wrong.
    """
    return read_extensions(directory)[-1]


def read_extensions(directory: Path) -> list[VocabularyExtension]:
    """Read all extensions that `extension.json` records, the oldest first; errors as of `read_extension`."""
    path = Path(directory) / EXTENSION_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the directory of an extended tokenizer")
    fields = read_json(path)
    earlier = fields.pop(EARLIER, [])
    if not isinstance(earlier, list) or not all(isinstance(one, dict) for one in earlier):
        raise UserError(f"{path}: {EARLIER} must be a list of extensions, not {abbreviated(earlier)}")
    before = []
    for number, one in enumerate(earlier):
        inner = {name: value for name, value in one.items() if name != EARLIER}
        before.append(_parse({"format": FORMAT, **inner}, f"{path}: {EARLIER} {number}"))
    return [*sorted(before, key=lambda one: one.base_vocab_size), _parse(fields, str(path))]


def _parse(fields: dict[str, Any], place: str) -> VocabularyExtension:
    version = fields.get("format")
    if version != FORMAT:
        raise UserError(f"{place}: format {abbreviated(version)} is not known to this version, only {FORMAT}")
    if different := sorted(KEYS ^ fields.keys()):
        what = "lacks" if different[0] in KEYS else "has an unknown field,"
        raise UserError(f"{place}: {what} {abbreviated(different[0])}; copy the file again")
    base, pieces = fields["base_vocab_size"], fields["pieces"]
    checks = {
        "base_vocab_size": is_integer(base, 1, MAX_TOKENS),
        "new_tokens": is_integer(fields["new_tokens"], 1, MAX_TOKENS),
        "base_tokenizer_fingerprint": isinstance(fields["base_tokenizer_fingerprint"], str),
        "tokenizer_fingerprint": isinstance(fields["tokenizer_fingerprint"], str),
        "guarded": _is_guarded(fields["guarded"]),
        "pieces": isinstance(pieces, list) and all(map(_is_piece_list, pieces)),
    }
    for name, is_valid in checks.items():
        if not is_valid:
            raise UserError(f"{place}: {name} cannot be {abbreviated(fields[name])}; copy the file again")
    if len(pieces) != fields["new_tokens"]:
        raise UserError(f"{place}: {len(pieces):,} entries in pieces, and new_tokens is {fields['new_tokens']:,}")
    largest = max(max(ids) for ids in pieces)
    if largest >= base:
        raise UserError(f"{place}: pieces name the token {largest:,}, and the base has {base:,}; copy the file again")
    guarded = {name: (one["documents"], one["changed"]) for name, one in fields["guarded"].items()}
    return VocabularyExtension(
        base, fields["base_tokenizer_fingerprint"], fields["tokenizer_fingerprint"], guarded, pieces
    )


def _is_piece_list(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(is_integer(number, 0, MAX_TOKENS) for number in value)


def _is_guarded(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(one, dict)
        and one.keys() == {"documents", "changed"}
        and is_integer(one["documents"])
        and is_integer(one["changed"], 0, one["documents"])
        for one in value.values()
    )
