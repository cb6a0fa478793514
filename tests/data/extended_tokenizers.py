"""Hand-made tokenizers: words of Latin and Greek letters, and extensions of it by merges of Greek letters."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_moe_lpr.data.tokenizer import load_tokenizer

EOD = "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyzαβγδεζηθικλμνξοπρστυφχψως"
BASE_MERGES = (("t", "h"), ("th", "e"), ("α", "ι"))
FIRST_MERGES = (("κ", "αι"), ("τ", "ο"), ("ο", "υ"), ("τ", "ου"), ("τ", "η"), ("τη", "ς"), ("σ", "τ"))
"""Seven new tokens, two of them built on other new ones."""
SECOND_MERGES = (("σ", "το"), ("σ", "τη"), ("ν", "α"))
ROWS = 99
"""Rows of the tiny models' embedding; the base tokenizer has fewer tokens, as those of many published models."""
TEXT = "και το του της στο the"


def make_base(directory: Path) -> Path:
    """The tokenizer before any extension: 54 tokens."""
    tokens = [EOD, "<unk>", *LETTERS, *("".join(pair) for pair in BASE_MERGES)]
    _write(directory, {token: number for number, token in enumerate(tokens)}, BASE_MERGES)
    return directory


def extend(
    base: Path,
    directory: Path,
    merges: Sequence[tuple[str, str]] = FIRST_MERGES,
    rows: int = ROWS,
    guarded: Mapping[str, tuple[int, int]] | None = None,
) -> Path:
    """Write the tokenizer of `base` with further merges, and the record of the extension."""
    before = load_tokenizer(base)
    content = json.loads((base / "tokenizer.json").read_text())["model"]
    vocab = content["vocab"] | {"".join(pair): rows + number for number, pair in enumerate(merges)}
    _write(directory, vocab, [*map(tuple, content["merges"]), *merges])
    documents = {"en": (20, 0), "es": (20, 3)} if guarded is None else guarded
    record = {
        "format": 1,
        "base_vocab_size": rows,
        "new_tokens": len(merges),
        "base_tokenizer_fingerprint": before.fingerprint,
        "tokenizer_fingerprint": load_tokenizer(directory).fingerprint,
        "guarded": {name: {"documents": count, "changed": changed} for name, (count, changed) in documents.items()},
        "pieces": [before.encode_batch(["".join(pair)])[0] for pair in merges],
    }
    former = base / "extension.json"
    if former.is_file():
        earlier = json.loads(former.read_text())
        record["earlier"] = [*earlier.pop("earlier", []), earlier]
    (directory / "extension.json").write_text(json.dumps(record))
    return directory


def give_tokenizer(model: Path, tokenizer: Path) -> Path:
    """Copy a tokenizer's files into the directory of a model."""
    for file in tokenizer.iterdir():
        shutil.copyfile(file, model / file.name)
    return model


def _write(directory: Path, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
    model = {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in merges], "unk_token": "<unk>"}
    added = [
        {"id": number, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, token in enumerate((EOD, "<unk>"))
    ]
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    settings = {"eos_token": EOD, "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
