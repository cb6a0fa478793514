"""The dataset manifest PREFIX.json: language, tokenizer, counts and checksums of the dataset's other files."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import megatron_moe_lpr
from megatron_moe_lpr.data.language_names import canonical_language
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksums import checksum_of_file, sha256_of_file
from megatron_moe_lpr.files.json_files import abbreviated, is_integer, parse_json_object, write_json
from megatron_moe_lpr.program import command

LANGUAGE_PATTERN = re.compile(r"[A-Za-z0-9]+([_-][A-Za-z0-9]+)*")
FORMAT = "megatron-moe-lpr indexed dataset 1"


@dataclasses.dataclass(frozen=True)
class Source:
    """One input file: its name as given and its bytes on disk (0 for standard input)."""

    name: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of `PREFIX.json`. One prefix holds one language."""

    language: str
    """Canonical spelling (`language_names.canonical_language`); normalised when reading older manifests."""
    tokenizer: str
    """Fingerprint of the tokenizer: sha256 in hex, see `tokenizer.Tokenizer`."""
    vocab_size: int
    eod: int
    """Token id that ends a document."""
    append_eod: bool
    """Whether every document ends with `eod`."""
    dtype: str
    """Dtype of token ids in the .bin: uint16 or int32."""
    documents: int
    tokens: int
    """Number of tokens, including EOD."""
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    bin_bytes: int
    idx_bytes: int
    index_sha256: str
    """Checksum of the .idx; also the key of cached index maps."""
    skipped: dict[str, int]
    """Counts of documents left out, by reason, and of documents kept with a repair."""
    sources: list[Source]
    bin_xxh3_128: str | None = None
    """Checksum of the .bin, computed while writing; None in manifests of older versions."""
    largest_token: int | None = None
    """Largest token id in the .bin; None in manifests of older versions."""
    partition: str | None = None
    """`i/n` for partition i of a run with --partitions n."""
    shuffle_seed: int | None = None
    version: str = megatron_moe_lpr.__version__
    """Version of this package that wrote the dataset."""
    chat: bool = False
    """Whether the documents are conversations, with `PREFIX.loss_mask` beside the tokens."""
    chat_template: str | None = None
    """Fingerprint of the chat template (`chat_template.ChatTemplate`); None where no template was there."""
    loss_tokens: int | None = None
    """Tokens of the conversations that count in the loss; None if `chat` is false."""
    loss_mask_xxh3_128: str | None = None
    """Checksum of `PREFIX.loss_mask`; None if `chat` is false."""
    loss_text_bytes: int | None = None
    """UTF-8 bytes of what counts in the loss of the conversations; None if `chat` is false, and in manifests that an
    older version wrote."""

    def write(self, prefix: str) -> None:
        """Write `PREFIX.json` atomically. Call it last, after the other files are complete."""
        content = dataclasses.asdict(self)
        if not self.chat:
            # Manifests of plain text stay readable by versions that know no conversations.
            content = {name: value for name, value in content.items() if name not in CHAT_FIELDS}
        write_json({"format": FORMAT, **content}, manifest_path(prefix))


CHAT_FIELDS = ("chat", "chat_template", "loss_tokens", "loss_mask_xxh3_128", "loss_text_bytes")


def manifest_path(prefix: str) -> Path:
    """`PREFIX.json`"""
    return Path(f"{prefix}.json")


def bin_path(prefix: str) -> Path:
    """`PREFIX.bin`"""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str) -> Path:
    """`PREFIX.idx`"""
    return Path(f"{prefix}.idx")


def loss_mask_path(prefix: str) -> Path:
    """`PREFIX.loss_mask`, which only datasets of conversations have: uint8 of each token of the .bin, 1 or 0."""
    return Path(f"{prefix}.loss_mask")


FILES = (manifest_path, bin_path, idx_path, loss_mask_path)


def dataset_files(prefixes: Sequence[str]) -> list[Path]:
    """Return the paths of all files that each dataset may have, whether or not they exist."""
    return [place(strip_suffix(prefix)) for prefix in prefixes for place in FILES]


def strip_suffix(prefix: str) -> str:
    """Return the prefix of a dataset, given the prefix or one of its files."""
    for suffix in (".json", ".bin", ".idx", ".loss_mask"):
        if prefix.endswith(suffix):
            return prefix[: -len(suffix)]
    return prefix


def read_manifest(prefix: str) -> Manifest:
    """Read `PREFIX.json` and check the sizes of the dataset's other files against it.

    Raises:
        UserError: one of the files is missing, truncated or not what the manifest says.
    """
    path = manifest_path(prefix)
    manifest = _parse(path)
    sizes = {bin_path(prefix): manifest.bin_bytes, idx_path(prefix): manifest.idx_bytes}
    if manifest.chat:
        sizes[loss_mask_path(prefix)] = manifest.tokens
    for file, size in sizes.items():
        if not file.is_file():
            raise UserError(f"{file}: missing, though {path} describes it; run {command('preprocess')} again")
        found = file.stat().st_size
        if found != size:
            kind = "truncated" if found < size else "too long"
            raise UserError(f"{file}: {kind}, {found:,} bytes instead of {size:,}; copy it or preprocess again")
    if manifest.bin_bytes != manifest.tokens * np.dtype(manifest.dtype).itemsize:
        raise UserError(f"{path}: {manifest.tokens:,} tokens do not fill a .bin of {manifest.bin_bytes:,} bytes")
    return manifest


def verify_index(prefix: str, manifest: Manifest) -> None:
    """Compare `PREFIX.idx` (20 bytes per document) with its checksum.

    Raises:
        UserError: the content differs.
    """
    path = idx_path(prefix)
    if _index_sha256(path, path.stat().st_mtime_ns) != manifest.index_sha256:
        raise UserError(
            f"{path}: damaged: not the index that {manifest_path(prefix)} describes; copy it or preprocess again"
        )


def verify_tokens(prefix: str, manifest: Manifest) -> bool:
    """Compare all of `PREFIX.bin`, and of `PREFIX.loss_mask` where there is one, with their checksums.

    Returns False if an older version recorded none.

    Raises:
        UserError: the content differs.
    """
    if manifest.bin_xxh3_128 is None:
        return False
    checksums = {bin_path(prefix): manifest.bin_xxh3_128}
    if manifest.chat:
        checksums[loss_mask_path(prefix)] = manifest.loss_mask_xxh3_128 or ""
    for path, checksum in checksums.items():
        if checksum_of_file(path).checksum != checksum:
            raise UserError(f"{path}: damaged: its checksum is another one; copy it or preprocess again")
    return True


def check_tokenizer(prefix: str, manifest: Manifest, fingerprint: str, name: str) -> None:
    """Raise UserError if the dataset was made with another tokenizer than `name`, whose fingerprint is given."""
    if manifest.tokenizer != fingerprint:
        raise UserError(
            f"{prefix}: was made with another tokenizer than {name} "
            f"({manifest.tokenizer[:12]} is not {fingerprint[:12]}); preprocess again with that one"
        )


def check_agreement(manifests: dict[str, Manifest], fields: Sequence[str]) -> None:
    """Raise UserError if two datasets differ in one of the fields; names both."""
    (first_prefix, first), *others = manifests.items()
    for prefix, manifest in others:
        for field in fields:
            ours, theirs = getattr(first, field), getattr(manifest, field)
            if ours != theirs:
                raise UserError(f"{prefix}: {field} is {theirs}, but {ours} in {first_prefix}; they can't be mixed")


@functools.lru_cache(maxsize=1024)
def _index_sha256(path: Path, modified: int) -> str:
    """Return the checksum, cached because a run reads each manifest several times; `modified` is part of the key."""
    return sha256_of_file(path)


def _parse(path: Path) -> Manifest:
    if not path.is_file():
        raise UserError(f"{path}: no such file; datasets are made by {command('preprocess')}, give their prefix")
    content = parse_json_object(path.read_bytes(), f"{path}: not a manifest of {command('preprocess')}")
    try:
        if content.pop("format") != FORMAT:
            raise ValueError("unknown format")
        sources = [Source(**source) for source in content.pop("sources")]
        manifest = Manifest(sources=sources, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a manifest of {command('preprocess')} ({error})") from None
    for name, is_valid in _FIELD_CHECKS.items():
        if not is_valid(getattr(manifest, name)):
            raise UserError(
                f"{path}: {name} cannot be {abbreviated(getattr(manifest, name))}; copy the file again or preprocess "
                "again"
            )
    return dataclasses.replace(manifest, language=canonical_language(manifest.language))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_partition(value: object) -> bool:
    if value is None:
        return True
    match = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", value) if isinstance(value, str) else None
    return match is not None and 1 <= int(match[1]) <= int(match[2])


_FIELD_CHECKS = {
    "language": lambda value: isinstance(value, str) and bool(LANGUAGE_PATTERN.fullmatch(value)),
    "tokenizer": _is_text,
    "vocab_size": lambda value: is_integer(value, 1, 2**31 - 1),
    "eod": lambda value: is_integer(value, 0, 2**31 - 1),
    "append_eod": lambda value: isinstance(value, bool),
    "dtype": lambda value: isinstance(value, str) and value in ("uint16", "int32"),
    **dict.fromkeys(("documents", "tokens", "text_bytes", "bin_bytes", "idx_bytes"), is_integer),
    "index_sha256": _is_text,
    "skipped": lambda value: isinstance(value, dict) and all(map(is_integer, value.values())),
    "sources": lambda value: all(isinstance(one.name, str) and is_integer(one.bytes) for one in value),
    "bin_xxh3_128": lambda value: value is None or isinstance(value, str),
    "largest_token": lambda value: value is None or is_integer(value, 0, 2**31 - 1),
    "partition": _is_partition,
    "shuffle_seed": lambda value: value is None or is_integer(value),
    "version": _is_text,
    "chat": lambda value: isinstance(value, bool),
    "chat_template": lambda value: value is None or isinstance(value, str),
    **dict.fromkeys(("loss_tokens", "loss_text_bytes"), lambda value: value is None or is_integer(value)),
    "loss_mask_xxh3_128": lambda value: value is None or isinstance(value, str),
}
