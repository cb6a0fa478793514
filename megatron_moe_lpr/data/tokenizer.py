"""Tokenizers: a Hugging Face `tokenizer.json` or a SentencePiece `.model` behind one small interface."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_moe_lpr.data.other_tokenizers import other_model_file, other_tokenizer
from megatron_moe_lpr.data.sentencepiece_conversion import convert_sentencepiece
from megatron_moe_lpr.data.tokenizer_extension import read_extension
from megatron_moe_lpr.data.tokenizer_settings import CONFIG, AddedToken, added_tokens, eos_ids, eos_token
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import read_json, required_int
from megatron_moe_lpr.files.lfs_pointers import refuse_lfs_pointers

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

# Files beside tokenizer.json that other tools need to load the same tokenizer.
COMPANION_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


class Tokenizer(ABC):
    """A tokenizer for training data: `encode_batch` adds no special tokens; callers append the end of a document (EOD).

    Attributes:
        path: the `tokenizer.json` or `.model` file.
        vocab_size: largest token id + 1.
        fingerprint: sha256 in hex of everything that determines the ids; equal for copies of the files.
        split_special_tokens: encode special tokens in a text as plain text, as the Hugging Face option of that name.
        special_tokens: tokens that would otherwise be recognised in a text.
    """

    path: Path
    vocab_size: int
    fingerprint: str
    eod_token: str | None
    split_special_tokens: bool
    special_tokens: frozenset[str]

    @functools.cached_property
    def eod(self) -> int:
        """Token id that ends a document (EOD).

        From --eod-token, else eos_token in tokenizer_config.json or special_tokens_map.json, else eos_token_id in
        generation_config.json or config.json, else the SentencePiece model.

        Raises:
            UserError: none of them names one.
        """
        named = (self.eod_token, None) if self.eod_token else eos_token(self.path.parent)
        if named is not None:
            number = self.token_id(named[0])
            if number is None:
                raise UserError(f"{self.path}: the EOD token {named[0]!r} is not in the vocabulary; pass --eod-token")
            return number
        for number in (eos_ids(self.path.parent) or ([],))[0]:
            if number < self.vocab_size:
                return number
        return self._own_eos()

    def eod_note(self) -> str | None:
        """Return a note if the files beside the tokenizer disagree about the token that ends a text, else None."""
        declared = eos_ids(self.path.parent)
        if declared is None or self.eod in declared[0]:
            return None
        numbers, file = declared
        return (
            f"documents end with {self.token(self.eod)!r} ({self.eod}), the eos_token of the tokenizer or --eod-token, "
            f"and {file} has the eos_token_id {', '.join(map(str, numbers))}; --eod-token takes another token"
        )

    @abstractmethod
    def _own_eos(self) -> int: ...

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """Return the id of a token; None if it is unknown."""

    @abstractmethod
    def token(self, number: int) -> str | None:
        """Return the token of an id; None if it is unknown."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return token ids of each text. Texts have no lone surrogates (see `documents.replace_surrogates`)."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, including special tokens."""

    @property
    @abstractmethod
    def rust(self) -> "RustTokenizer":
        """The tokenizer as one of Hugging Face's `tokenizers`, which knows the characters of each token."""

    @property
    def dtype(self) -> np.dtype:
        """Dtype of stored ids: uint16 for small vocabularies, else int32 (Megatron's rule)."""
        return np.dtype(np.uint16) if self.vocab_size < 65500 else np.dtype(np.int32)

    def __reduce__(self) -> tuple:
        # Pickled to worker processes that are spawned: each reads the file again.
        return load_tokenizer, (self.path, self.eod_token, self.split_special_tokens)

    def save(self, directory: Path) -> None:
        """Copy the tokenizer's files, so that `load_tokenizer(directory)` gives the same fingerprint."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in (self.path.name, *COMPANION_FILES):
            source = self.path.with_name(name)
            if source.is_file():
                shutil.copyfile(source, directory / name)


def load_tokenizer(path: str | Path, eod_token: str | None = None, split_special_tokens: bool = True) -> Tokenizer:
    """Read a tokenizer.

    Args:
        path: a directory holding `tokenizer.json` or one `.model`, or such a file itself.
        eod_token: token that ends a document; default: the tokenizer's end-of-sequence token.
        split_special_tokens: encode special tokens in a text as plain text; otherwise as the special tokens.

    Raises:
        UserError: the file does not exist or is not a tokenizer.
    """
    file = _tokenizer_file(Path(path))
    refuse_lfs_pointers(file.parent, (file.name,))
    kind = HuggingFaceTokenizer if file.suffix == ".json" else SentencePieceTokenizer
    return kind(file, eod_token, split_special_tokens)


def _tokenizer_file(path: Path) -> Path:
    if path.is_file() and path.suffix in (".json", ".model"):
        return path
    if not path.exists():
        raise UserError(f"{path}: no such tokenizer; give a directory, a tokenizer.json or a SentencePiece .model")
    # transformers reads these two names only; further .model files beside them are other tokenizers.
    names = ("tokenizer.json", "tokenizer.model")
    candidates = [*(path / name for name in names), *sorted(path.glob("*.model"))] if path.is_dir() else []
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(f"{path}: holds neither a tokenizer.json nor a SentencePiece .model{other_tokenizer(path)}")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, run by the Rust `tokenizers` library."""

    def __init__(self, path: Path, eod_token: str | None = None, split_special_tokens: bool = True) -> None:
        from tokenizers import Tokenizer as RustTokenizer

        self.path, self.eod_token, self.split_special_tokens = path, eod_token, split_special_tokens
        content = read_json(path)
        try:
            self._tokenizer = RustTokenizer.from_file(str(path))
        except (
            BaseException
        ) as error:  # the library raises a bare Exception, and a BaseException if its Rust code panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{path}: not a tokenizer.json that this tokenizers library reads ({error})") from None
        # Fine-tuning often leaves truncation or padding in tokenizer.json.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.fingerprint = _recorded_fingerprint(path, fingerprint_of_json(content))
        self._mark_special()

    def _mark_special(self) -> None:
        """Mark the EOD token as special, which some tokenizer.json files do not, and set `special_tokens`."""
        ends = {self.eod_token}
        with contextlib.suppress(UserError):  # a bad value is reported when `eod` is read
            ends |= set((eos_token(self.path.parent) or ())[:1])
        decoder = self._tokenizer.get_added_tokens_decoder()
        for token in decoder.values():
            if token.content in ends and not token.special:
                token.special = True
                self._tokenizer.add_special_tokens([token])
        self.special_tokens = frozenset(
            token.content for token in decoder.values() if token.special or token.content in ends
        )
        self._tokenizer.encode_special_tokens = self.split_special_tokens

    @property
    def rust(self) -> "RustTokenizer":
        return self._tokenizer

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [item.ids for item in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token(self, number: int) -> str | None:
        return self._tokenizer.id_to_token(number)

    def _own_eos(self) -> int:
        raise UserError(f"{self.path}: no tokenizer_config.json beside it names an eos_token; pass --eod-token")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`, plus the tokens added by the files beside it."""

    def __init__(self, path: Path, eod_token: str | None = None, split_special_tokens: bool = True) -> None:
        import sentencepiece

        self.path, self.eod_token, self.split_special_tokens = path, eod_token, split_special_tokens
        try:
            self._tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: not a SentencePiece model ({error}){other_model_file(path)}") from None
        pieces = self._tokenizer.vocab_size()
        tokens = added_tokens(path.parent)
        self._added = {token.content: token for token in tokens if token.id >= pieces}
        self.vocab_size = max([pieces, *(token.id + 1 for token in self._added.values())])
        ordinary = [token for token in self._added.values() if not token.special]
        self.fingerprint = _fingerprint_of_model(path, ordinary)
        control = {self._tokenizer.id_to_piece(number) for number in range(pieces) if self._tokenizer.IsControl(number)}
        self.special_tokens = frozenset(control | {token.content for token in tokens if token.special})
        # SentencePiece does not recognise added tokens; it is used where none must be, because it is faster.
        self._converted = None if split_special_tokens and not ordinary else self.converted()
        if self._converted is not None:
            self._converted.encode_special_tokens = split_special_tokens

    @functools.cached_property
    def rust(self) -> "RustTokenizer":
        tokenizer = self._converted or self.converted()
        tokenizer.encode_special_tokens = self.split_special_tokens
        return tokenizer

    def converted(self) -> "RustTokenizer":
        """Return the same tokenizer as one of Hugging Face's library, for the tokenizer.json of an export."""
        return convert_sentencepiece(self.path.read_bytes(), list(self._added.values()), str(self.path))

    def role_tokens(self) -> dict[str, str]:
        """Return the tokens with a role in the model, by Hugging Face names: bos_token, eos_token, unk_token."""
        model = self._tokenizer
        numbers = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        return {name: model.id_to_piece(number) for name, number in numbers.items() if number >= 0}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._converted is not None:
            return [item.ids for item in self._converted.encode_batch_fast(list(texts), add_special_tokens=False)]
        return self._tokenizer.encode(list(texts), out_type=int, num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        pieces = self._tokenizer.vocab_size()
        if all(token < pieces for token in ids):
            return self._tokenizer.decode([int(token) for token in ids])
        return self.converted().decode([int(token) for token in ids], skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token].id
        number = self._tokenizer.piece_to_id(token)
        return number if self._tokenizer.id_to_piece(number) == token else None

    def token(self, number: int) -> str | None:
        if number < self._tokenizer.vocab_size():
            return self._tokenizer.id_to_piece(number)
        return next((token.content for token in self._added.values() if token.id == number), None)

    def _own_eos(self) -> int:
        number = self._tokenizer.eos_id()
        if number < 0:
            raise UserError(
                f"{self.path}: no end-of-sentence piece to end documents with; pass --eod-token with one of its pieces"
            )
        return number


def _fingerprint_of_model(path: Path, ordinary: Sequence[AddedToken]) -> str:
    """Return sha256 of the `.model` and of those added tokens that change ids: the ones that are not special."""
    digest = hashlib.sha256(path.read_bytes())
    for token in ordinary:
        digest.update(json.dumps(dataclasses.asdict(token), sort_keys=True).encode("ascii"))
    return digest.hexdigest()


ORIGIN = "converted_from"
"""Key in tokenizer_config.json of an export: fingerprints of its tokenizer.json and of the source tokenizer."""


def _recorded_fingerprint(path: Path, fingerprint: str) -> str:
    """Return the fingerprint of an export's source tokenizer, which encodes to the same ids; else `fingerprint`."""
    file = path.with_name(CONFIG)
    origin = read_json(file).get(ORIGIN) if file.is_file() else None
    if not isinstance(origin, dict) or origin.get("tokenizer_json") != fingerprint:
        return fingerprint
    source = origin.get("source")
    return source if isinstance(source, str) else fingerprint


def fingerprint_of_json(content: dict[str, Any]) -> str:
    """Return sha256 of a `tokenizer.json` in a normal form that loading and saving it does not change.

    Ignores truncation and padding, which data preparation turns off, and whether merges are stored as pairs or strings.
    """
    content = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    model = content.get("model")
    model = dict(model) if isinstance(model, dict) else {}
    if isinstance(model.get("merges"), list):
        model["merges"] = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    content["model"] = model
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def model_vocabulary(path: Path) -> int | None:
    """Return `vocab_size` from the config.json beside a tokenizer; None if there is no such file.

    In a checkpoint it is the dense model's, without the tokens of a vocabulary extension, which are added here.

    Raises:
        UserError: a file is damaged or its `vocab_size` invalid.
    """
    file = path.with_name("config.json")
    fields = read_json(file) if file.is_file() else {}
    if "vocab_size" not in fields:
        return None
    size = required_int(fields, "vocab_size", str(file), 1, 2**31 - 1)
    extension = read_extension(path.parent)
    return size if extension is None else max(size, extension.vocab_size)
