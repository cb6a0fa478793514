"""Parse lines (JSON or plain text) into documents; count or report every line that is left out, by reason."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from megatron_moe_lpr.data.language_names import canonical_language
from megatron_moe_lpr.data.manifest import LANGUAGE_PATTERN
from megatron_moe_lpr.data.preparation.sources import MAX_LINE_BYTES, Block, count_lines
from megatron_moe_lpr.errors import UserError

T = TypeVar("T")

_SURROGATES = re.compile("[\ud800-\udfff]")
_LINE = re.compile(rb"[^\n]+")

EMPTY = "empty"
MALFORMED = "malformed"
TOO_LONG = "too_long"
NO_TEXT = "no_text"
NO_LANGUAGE = "no_language"
KEPT = "kept_with_"
"""Prefix of counts of documents that were kept, with a repair or a remark."""
REPAIRED = f"{KEPT}replaced_surrogates"


@dataclasses.dataclass(frozen=True)
class DocumentOptions:
    """How to parse one line into a document."""

    json_key: str = "text"
    language: str | None = None
    """Language of all documents; None: each document names its own under `language_key`."""
    language_key: str | None = None
    stop_on_error: bool = True
    max_line_bytes: int = MAX_LINE_BYTES
    """Longer lines are errors."""


class DocumentError(Exception):
    """A line is not a valid document. `reason` is the count it belongs to."""

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
        counts: incremented for each line left out, by reason. Empty and white-space documents are always left out.
        first: filled with `file:line: message` of the first error of each kind.

    Raises:
        UserError: a line is not a document and `stop_on_error` is set; names file and line.
    """

    def read(line: bytes | None) -> tuple[str, str | None]:
        language, text = _read_line(line, block, options)
        if not text or text.isspace():
            return language, None
        repaired = replace_surrogates(text)
        counts[REPAIRED] += repaired is not text
        return language, repaired

    return _read_lines(block, options, counts, first, read)


def read_objects(
    block: Block, options: DocumentOptions, counts: Counter, first: dict[str, str], convert: Callable[[dict], T]
) -> Iterator[tuple[str, T]]:
    """Yield (language, converted JSON object) of each line of a block; arguments as for `read_documents`.

    Args:
        convert: returns what is wanted of an object, or raises DocumentError.

    Raises:
        UserError: a line is no JSON object or `convert` refuses it, and `stop_on_error` is set; names file and line.
    """

    def read(line: bytes | None) -> tuple[str, T | None]:
        decoded = _decode(line, options)
        if not decoded or decoded.isspace():
            return options.language or "", None
        document = _parse_object(decoded)
        return options.language or _language(document, options.language_key), convert(document)

    return _read_lines(block, options, counts, first, read)


def _read_lines(
    block: Block,
    options: DocumentOptions,
    counts: Counter,
    first: dict[str, str],
    read: Callable[[bytes | None], tuple[str, T | None]],
) -> Iterator[tuple[str, T]]:
    """Yield (language, document) of each line that is not left out.

    Args:
        read: returns a line's language and document (None: empty), or raises DocumentError.
    """
    counts[EMPTY] += block.lines.count(b"\n") + (not block.lines.endswith(b"\n"))
    for begin, line in _lines(block):
        counts[EMPTY] -= 1
        try:
            language, document = read(line)
        except DocumentError as error:
            counts[error.reason] += 1
            if options.stop_on_error or error.reason not in first:
                first[error.reason] = f"{block.source}:{_line_number(block, begin)}: {error}"
            if options.stop_on_error:
                raise UserError(f"{first[error.reason]}; correct it or pass --on-error skip") from None
            continue
        if document is None:
            counts[EMPTY] += 1
            continue
        name = language if options.language else canonical_language(language)
        if name != language:
            counts[f"{KEPT}language_{language.strip()}_read_as_{name}"] += 1
        yield name, document


def _lines(block: Block) -> Iterator[tuple[int, bytes | None]]:
    """Yield (offset, line) of each line that is not empty; None in the place of a line that was too long to keep.

    A regular expression skips empty lines in C: a few compressed KB can expand to a billion of them.
    """
    if block.too_long:
        yield 0, None
    for match in _LINE.finditer(block.lines):
        yield match.start(), match.group()


def replace_surrogates(text: str) -> str:
    """Return the text with every lone surrogate replaced by U+FFFD; the same object if there is none.

    JSON can hold lone surrogates ("\\ud800"), UTF-8 cannot.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return _SURROGATES.sub("\ufffd", text)
    return text


def _decode(line: bytes | None, options: DocumentOptions) -> str:
    if line is None or len(line) > options.max_line_bytes:
        raise DocumentError(TOO_LONG, f"longer than {options.max_line_bytes:,} bytes (--max-line-bytes)")
    try:
        # Files may begin with a byte order mark.
        return line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError(MALFORMED, f"not UTF-8 (byte {error.start + 1} of the line)") from None


def _parse_object(decoded: str) -> dict[str, Any]:
    try:
        document = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise DocumentError(MALFORMED, f"malformed JSON ({reason})") from None
    if not isinstance(document, dict):
        raise DocumentError(MALFORMED, "not a JSON object")
    return document


def _read_line(line: bytes | None, block: Block, options: DocumentOptions) -> tuple[str, str]:
    decoded = _decode(line, options)
    if block.plain_text:
        return options.language or "", decoded.removesuffix("\r")
    if not decoded or decoded.isspace():
        return options.language or "", ""
    document = _parse_object(decoded)
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


def _line_number(block: Block, begin: int) -> int:
    """Return the line's number in the file; the block counts from the start of the partition's slice."""
    before = count_lines(block.source, block.start_offset) if block.start_offset else 0
    return block.line_number + before + block.lines.count(b"\n", 0, begin)
