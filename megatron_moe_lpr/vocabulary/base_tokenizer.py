"""The tokenizer that gets new tokens: read, and refused where its kind has no merges to continue."""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe_lpr.data.tokenizer import SentencePieceTokenizer, load_tokenizer, model_vocabulary
from megatron_moe_lpr.data.tokenizer_extension import TokenizerExtension, read_extension
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

OTHER_MODELS = {
    "Unigram": "it chooses pieces by their probability and has no merges to continue; a new piece would change how "
    "texts of all languages are split",
    "WordPiece": "it takes the longest known piece and has no merges to continue; a new piece would change how texts "
    "of all languages are split",
    "WordLevel": "it knows whole words and has no merges to continue",
}


@dataclasses.dataclass(frozen=True)
class BaseTokenizer:
    """A BPE tokenizer as the content of its tokenizer.json.

    Attributes:
        path: the `tokenizer.json` or `tokenizer.model`.
        content: the fields of tokenizer.json; merges are pairs.
        fingerprint: as in the manifests of datasets.
        rows: rows of the model's embedding matrix; new ids begin here.
        byte_fallback: SentencePiece's form, where unknown characters become byte tokens; otherwise byte-level.
        earlier: the extensions that it already has, oldest first.
    """

    path: Path
    content: dict[str, Any]
    fingerprint: str
    rows: int
    byte_fallback: bool
    earlier: list[TokenizerExtension]

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        """Ids of all tokens, added ones too."""
        added = {token["content"]: token["id"] for token in self.content.get("added_tokens") or []}
        return {**self.content["model"]["vocab"], **added}

    @functools.cached_property
    def texts(self) -> dict[int, str]:
        """Tokens by id, as the vocabulary writes them."""
        return {number: token for token, number in self.vocabulary.items()}

    @functools.cached_property
    def byte_ids(self) -> dict[int, int]:
        """By id the byte of each byte token, `<0x0A>`; empty for a byte-level tokenizer."""
        if not self.byte_fallback:
            return {}
        names = {f"<0x{byte:02X}>": byte for byte in range(256)}
        return {self.vocabulary[name]: byte for name, byte in names.items() if name in self.vocabulary}

    def rust(self) -> "RustTokenizer":
        """Return the tokenizer of Hugging Face's library; special tokens that occur in a text are encoded as text."""
        return rust_tokenizer(self.content, self.path)


def rust_tokenizer(content: dict[str, Any], path: Path) -> "RustTokenizer":
    """Build the tokenizer of Hugging Face's library from the fields of a tokenizer.json. Raises UserError."""
    from tokenizers import Tokenizer as RustTokenizer

    try:
        tokenizer = RustTokenizer.from_str(json.dumps(content, ensure_ascii=False))
    except Exception as error:  # the library raises no other kind
        raise UserError(f"{path}: not a tokenizer.json that this tokenizers library reads ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def read_base(directory: Path) -> BaseTokenizer:
    """Read the tokenizer of a Hugging Face directory.

    Raises:
        UserError: there is none, its kind cannot be extended, or its ids do not fit the vocab_size of config.json.
    """
    tokenizer = load_tokenizer(directory)
    if isinstance(tokenizer, SentencePieceTokenizer):
        content = json.loads(tokenizer.converted().to_str())
    else:
        content = read_json(tokenizer.path)
    byte_fallback = _check_kind(content, tokenizer.path)
    model = content["model"]
    model["merges"] = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    previous = read_extension(tokenizer.path.parent)
    if previous is not None and previous.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UserError(f"{tokenizer.path}: not the tokenizer that extension.json beside it describes; copy both again")
    earlier = [] if previous is None else [*previous.earlier, dataclasses.replace(previous, earlier=[])]
    rows = _rows(tokenizer.path, tokenizer.vocab_size, previous)
    return BaseTokenizer(tokenizer.path, content, tokenizer.fingerprint, rows, byte_fallback, earlier)


def _rows(path: Path, ids: int, previous: TokenizerExtension | None) -> int:
    rows = model_vocabulary(path)
    if rows is None and previous is None:
        print(
            f"note: {path}: no config.json with a vocab_size beside it; new ids begin at {ids:,}, as if the model's "
            "embedding had no further rows",
            file=sys.stderr,
        )
    known = previous.vocab_size if previous else ids
    rows = known if rows is None else rows
    if rows < max(ids, known):
        raise UserError(
            f"{path.with_name('config.json')}: vocab_size is {rows:,}, and the tokenizer beside it has ids up to "
            f"{max(ids, known) - 1:,}; give the directory of a model with a row for each token"
        )
    return rows


def _check_kind(content: dict[str, Any], path: Path) -> bool:
    """Return whether it is SentencePiece's form of BPE (byte fallback), not byte-level. Raises UserError."""
    model = content.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE" or not isinstance(model.get("merges"), list):
        reason = OTHER_MODELS.get(str(kind), "only a BPE tokenizer has merges to continue")
        raise UserError(f"{path}: a {kind} tokenizer cannot be extended: {reason}")
    for field in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(field):
            raise UserError(f"{path}: a BPE tokenizer with {field} cannot be extended: only byte-level ones and ones "
                            "with byte fallback can")  # fmt: skip
    if _has_byte_level(content.get("pre_tokenizer")) or _has_byte_level(content.get("normalizer")):
        return False
    if not model.get("byte_fallback"):
        raise UserError(
            f"{path}: a BPE tokenizer of characters without byte fallback cannot be extended: characters that it does "
            "not know are lost before the merges"
        )
    return True


def _has_byte_level(step: object) -> bool:
    """Whether a normalizer or pre-tokenizer writes bytes as printable characters, itself or in a step of a sequence."""
    if not isinstance(step, dict):
        return False
    inner = [*(step.get("pretokenizers") or []), *(step.get("normalizers") or [])]
    return step.get("type") == "ByteLevel" or any(map(_has_byte_level, inner))
