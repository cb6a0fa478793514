"""Text to token ids and back: a Hugging Face `tokenizer.json` or a SentencePiece `.model`, behind one small class."""

import functools
import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe_lpr.data.other_tokenizers import other_model_file, other_tokenizer
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.json_files import integer, is_integer, read_json, shown
from megatron_moe_lpr.lfs_pointers import refuse_lfs_pointers

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
    """A tokenizer as training data needs it: no special token is ever added but the end of a document (EOD).

    Attributes:
        path: the `tokenizer.json` or `.model` it was read from.
        vocab_size: the largest id + 1.
        fingerprint: sha256 in hex of what decides the ids; the same for a copy in another directory.
    """

    path: Path
    vocab_size: int
    fingerprint: str
    eod_token: str | None

    @functools.cached_property
    def eod(self) -> int:
        """The id that ends a document; raises UserError where none is to be found."""
        return self._find_eod(self.eod_token)

    @abstractmethod
    def _find_eod(self, token: str | None) -> int: ...

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text. The texts hold no lone surrogates (see `documents.replace_surrogates`)."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""

    @property
    def dtype(self) -> np.dtype:
        """What the ids are stored as: uint16 for small vocabularies, else int32 (Megatron's own rule)."""
        return np.dtype(np.uint16) if self.vocab_size < 65500 else np.dtype(np.int32)

    def __reduce__(self) -> tuple:
        # Where worker processes can't be forked, each reads the file again.
        return load_tokenizer, (self.path, self.eod_token)

    def save(self, directory: Path) -> None:
        """Copy the tokenizer's files, so that `load_tokenizer(directory)` gives the same fingerprint."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in (self.path.name, *COMPANION_FILES):
            source = self.path.with_name(name)
            if source.is_file():
                shutil.copyfile(source, directory / name)


def load_tokenizer(path: str | Path, eod_token: str | None = None) -> Tokenizer:
    """Read a tokenizer.

    Args:
        path: a directory holding `tokenizer.json` or one `.model`, or such a file itself.
        eod_token: the token that ends a document, where the tokenizer's own end-of-sequence token is not wanted.

    Raises:
        UserError: no such file, or not a tokenizer.
    """
    file = _tokenizer_file(Path(path))
    refuse_lfs_pointers(file.parent, (file.name,))
    kind = HuggingFaceTokenizer if file.suffix == ".json" else SentencePieceTokenizer
    return kind(file, eod_token)


def _tokenizer_file(path: Path) -> Path:
    if path.is_file() and path.suffix in (".json", ".model"):
        return path
    if not path.exists():
        raise UserError(f"{path}: no such tokenizer; give a directory, a tokenizer.json or a SentencePiece .model")
    candidates = [path / "tokenizer.json", *sorted(path.glob("*.model"))] if path.is_dir() else []
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(f"{path}: holds neither a tokenizer.json nor a SentencePiece .model{other_tokenizer(path)}")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, run by the Rust `tokenizers` library."""

    def __init__(self, path: Path, eod_token: str | None = None) -> None:
        from tokenizers import Tokenizer as RustTokenizer

        self.path, self.eod_token = path, eod_token
        content = read_json(path)
        try:
            self._tokenizer = RustTokenizer.from_file(str(path))
        except BaseException as error:  # the library raises a bare Exception, and where it panics a BaseException
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{path}: not a tokenizer.json that this tokenizers library reads ({error})") from None
        # A tokenizer.json may carry a truncation or a padding, left over from fine-tuning.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.fingerprint = fingerprint_of_json(content)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [item.ids for item in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)

    def _find_eod(self, token: str | None) -> int:
        token = token or _configured_eos_token(self.path)
        if token is None:
            number = _configured_eos_id(self.path)
            if number is not None and 0 <= number < self.vocab_size:
                return number
            raise UserError(f"{self.path}: no tokenizer_config.json beside it names an eos_token; pass --eod-token")
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise UserError(f"{self.path}: the EOD token {token!r} is not in the vocabulary; pass --eod-token")
        return number


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`."""

    def __init__(self, path: Path, eod_token: str | None = None) -> None:
        import sentencepiece

        self.path, self.eod_token = path, eod_token
        try:
            self._tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: not a SentencePiece model ({error}){other_model_file(path)}") from None
        self.vocab_size = self._tokenizer.vocab_size()
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer.encode(list(texts), out_type=int, num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids])

    def _find_eod(self, token: str | None) -> int:
        number = self._tokenizer.eos_id() if token is None else self._tokenizer.piece_to_id(token)
        if number < 0 or (token is not None and number == self._tokenizer.unk_id()):
            named = "no end-of-sentence piece" if token is None else f"no piece {token!r}"
            raise UserError(f"{self.path}: {named} to end documents with; pass --eod-token with a piece of the model")
        return number


def fingerprint_of_json(content: dict[str, Any]) -> str:
    """Sha256 of a `tokenizer.json` in a form that re-saving it does not change.

    Left out: truncation and padding, which data preparation turns off. Merges are written as pairs, whether the file
    has them as pairs or as strings.
    """
    content = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    model = content.get("model")
    model = dict(model) if isinstance(model, dict) else {}
    if isinstance(model.get("merges"), list):
        model["merges"] = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    content["model"] = model
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _configured_eos_token(path: Path) -> str | None:
    file = path.with_name("tokenizer_config.json")
    token = read_json(file).get("eos_token") if file.is_file() else None
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        raise UserError(f"{file}: eos_token must be text, not {shown(token)}; correct it or pass --eod-token")
    return token


def _configured_eos_id(path: Path) -> int | None:
    for name in ("generation_config.json", "config.json"):
        file = path.with_name(name)
        number = read_json(file).get("eos_token_id") if file.is_file() else None
        number = number[0] if isinstance(number, list) and number else number
        if is_integer(number):
            return number
    return None


def model_vocabulary(path: Path) -> int | None:
    """The `vocab_size` of the model that a tokenizer's directory belongs to; None where no config.json is beside it.

    Raises:
        UserError: the file is there and says none.
    """
    file = path.with_name("config.json")
    if not file.is_file():
        return None
    fields = read_json(file)
    return integer(fields, "vocab_size", str(file), 1, 2**31 - 1) if "vocab_size" in fields else None
