"""Lines to documents: JSON or plain text, with every reason to leave one out counted or reported."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator

from megatron_moe_lpr.data.language_names import canonical_language
from megatron_moe_lpr.data.manifest import LANGUAGE_PATTERN
from megatron_moe_lpr.data.preparation.sources import Block, count_lines
from megatron_moe_lpr.errors import UserError

_SURROGATES = re.compile("[\ud800-\udfff]")

EMPTY = "empty"
MALFORMED = "malformed"
NO_TEXT = "no_text"
NO_LANGUAGE = "no_language"
KEPT = "kept_with_"
"""Begins the reasons under which documents are counted that are there."""
REPAIRED = f"{KEPT}replaced_surrogates"


@dataclasses.dataclass(frozen=True)
class DocumentOptions:
    """How to read a document out of a line."""

    json_key: str = "text"
    language: str | None = None
    """The language of every document; None: read it from `language_key`."""
    language_key: str | None = None
    stop_on_error: bool = True


class DocumentError(Exception):
    """One line is not a document: the reason to count it under, and a message."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_documents(
    block: Block, options: DocumentOptions, counts: Counter, first: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """Yield (language, text) of each document of a block, ready to be encoded as UTF-8.

    Args:
        block: the lines.
        options: how to read them.
        counts: gets the lines left out, by reason. Empty and white-space documents are always left out.
        first: gets, for each kind of error, `file:line: message` of its first.

    Raises:
        UserError: a line is no document and `stop_on_error` is on; names file and line.
    """
    for number, line in enumerate(block.lines.removesuffix(b"\n").split(b"\n")):
        try:
            language, text = _read_line(line, block, options)
        except DocumentError as error:
            counts[error.reason] += 1
            if options.stop_on_error or error.reason not in first:
                first[error.reason] = f"{block.source}:{_line_number(block, number)}: {error}"
            if options.stop_on_error:
                raise UserError(f"{first[error.reason]}; correct it or pass --on-error skip") from None
            continue
        if not text or text.isspace():
            counts[EMPTY] += 1
            continue
        repaired = replace_surrogates(text)
        counts[REPAIRED] += repaired is not text
        name = language if options.language else canonical_language(language)
        if name != language:
            counts[f"{KEPT}language_{language.strip()}_read_as_{name}"] += 1
        yield name, repaired


def replace_surrogates(text: str) -> str:
    """The text with every lone surrogate as U+FFFD; the same object if it has none.

    JSON can hold lone surrogates ("\\ud800"), UTF-8 can't.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return _SURROGATES.sub("\ufffd", text)
    return text


def _read_line(line: bytes, block: Block, options: DocumentOptions) -> tuple[str, str]:
    try:
        # A byte order mark may stand at the beginning of a file.
        decoded = line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError(MALFORMED, f"not UTF-8 (byte {error.start + 1} of the line)") from None
    if block.plain_text:
        return options.language or "", decoded.removesuffix("\r")
    if not decoded or decoded.isspace():
        return options.language or "", ""
    try:
        document = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise DocumentError(MALFORMED, f"malformed JSON ({reason})") from None
    if not isinstance(document, dict):
        raise DocumentError(MALFORMED, "not a JSON object")
    text = document.get(options.json_key)
    if not isinstance(text, str):
        known = f"it has {', '.join(list(document)[:8]) or 'none'}" if options.json_key not in document else "not text"
        raise DocumentError(NO_TEXT, f"no text under the key {options.json_key!r} (--json-key): {known}")
    return options.language or _language(document, options.language_key), text


def _language(document: dict, key: str | None) -> str:
    language = document.get(key)
    if not isinstance(language, str):
        raise DocumentError(NO_LANGUAGE, f"no language under the key {key!r} (--language-key)")
    if not LANGUAGE_PATTERN.fullmatch(canonical_language(language)):
        raise DocumentError(
            NO_LANGUAGE, f"language {language!r} can't be part of a file name; letters, digits, _ and -"
        )
    return language


def _line_number(block: Block, number: int) -> int:
    """In the whole file, though the block knows only its place in the partition's slice."""
    before = count_lines(block.source, block.start_offset) if block.start_offset else 0
    return number + block.line_number + before
