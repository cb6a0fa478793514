"""Text to token ids and back: a Hugging Face `tokenizer.json` or a SentencePiece `.model`, behind one small class."""

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
from megatron_moe_lpr.data.tokenizer_settings import CONFIG, AddedToken, added_tokens, eos_ids, eos_token
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import integer, read_json
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
    """A tokenizer as training data needs it: no special token is ever added but the end of a document (EOD).

    Attributes:
        path: the `tokenizer.json` or `.model` it was read from.
        vocab_size: the largest id + 1.
        fingerprint: sha256 in hex of what decides the ids; the same for a copy in another directory.
        split_special_tokens: encode special tokens that a text mentions as plain text, as Hugging Face's option does.
        special_tokens: what it would cut out of a text otherwise.
    """

    path: Path
    vocab_size: int
    fingerprint: str
    eod_token: str | None
    split_special_tokens: bool
    special_tokens: frozenset[str]

    @functools.cached_property
    def eod(self) -> int:
        """The id that ends a document.

        That of --eod-token, else of the eos_token in tokenizer_config.json or special_tokens_map.json, else the
        eos_token_id of generation_config.json or config.json, else the SentencePiece model's own.

        Raises:
            UserError: none is to be found.
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
        """What the files beside the tokenizer say otherwise of the token that ends a text; None: they agree."""
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
        """The id of a token; None where there is none of this name."""

    @abstractmethod
    def token(self, number: int) -> str | None:
        """The token of an id."""

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
        eod_token: the token that ends a document, where the tokenizer's own end-of-sequence token is not wanted.
        split_special_tokens: encode special tokens that a text mentions as plain text; else they are the real ones.

    Raises:
        UserError: no such file, or not a tokenizer.
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
    # transformers knows this name alone; other .model files beside it are other tokenizers.
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
        except BaseException as error:  # the library raises a bare Exception, and where it panics a BaseException
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{path}: not a tokenizer.json that this tokenizers library reads ({error})") from None
        # A tokenizer.json may carry a truncation or a padding, left over from fine-tuning.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.fingerprint = _recorded_fingerprint(path, fingerprint_of_json(content))
        self._mark_special()

    def _mark_special(self) -> None:
        """Decide what a mention in a text is. A tokenizer.json may hold the EOD token without marking it special."""
        ends = {self.eod_token}
        with contextlib.suppress(UserError):  # of a bad value, raised where `eod` is asked for
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
    """A SentencePiece `.model`, with the tokens that the files beside it add."""

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
        # SentencePiece itself cuts no added token out of a text, and is faster where none is to be.
        self._converted = None if split_special_tokens and not ordinary else self.converted()
        if self._converted is not None:
            self._converted.encode_special_tokens = split_special_tokens

    def converted(self) -> "RustTokenizer":
        """The same as a tokenizer of Hugging Face's library, which becomes a tokenizer.json in an export."""
        return convert_sentencepiece(self.path.read_bytes(), list(self._added.values()), str(self.path))

    def role_tokens(self) -> dict[str, str]:
        """The tokens of the model's own roles, by Hugging Face's names: bos_token, eos_token, unk_token."""
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
    """Sha256 of the `.model`, and of added tokens that are not special, which alone change the ids of a text."""
    digest = hashlib.sha256(path.read_bytes())
    for token in ordinary:
        digest.update(json.dumps(dataclasses.asdict(token), sort_keys=True).encode("ascii"))
    return digest.hexdigest()


ORIGIN = "converted_from"
"""In the tokenizer_config.json of an export: which fingerprint its tokenizer.json has, and which its source had."""


def _recorded_fingerprint(path: Path, fingerprint: str) -> str:
    """That of the tokenizer from which an export made this tokenizer.json: text encoded by either has the same ids."""
    file = path.with_name(CONFIG)
    origin = read_json(file).get(ORIGIN) if file.is_file() else None
    if not isinstance(origin, dict) or origin.get("tokenizer_json") != fingerprint:
        return fingerprint
    source = origin.get("source")
    return source if isinstance(source, str) else fingerprint


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
