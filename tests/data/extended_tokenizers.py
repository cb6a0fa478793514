"""Hand-made tokenizers: words of Latin and Greek letters, and extensions of it by merges of Greek letters."""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

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
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": tokens[number], "special": True} | flags for number in (0, 1)],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [list(pair) for pair in BASE_MERGES],
            "unk_token": "<unk>",
        },
    }
    _write(directory, content)
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
    content = json.loads((base / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"".join(pair): rows + number for number, pair in enumerate(merges)}
    content["model"]["merges"] += [list(pair) for pair in merges]
    _write(directory, content)
    splitter = Tokenizer.from_file(str(base / "tokenizer.json")).model
    documents = {"en": (20, 0), "es": (20, 3)} if guarded is None else guarded
    record = {
        "format": 1,
        "base_vocab_size": rows,
        "new_tokens": len(merges),
        "base_tokenizer_fingerprint": before.fingerprint,
        "tokenizer_fingerprint": load_tokenizer(directory).fingerprint,
        "guarded": {name: {"documents": count, "changed": changed} for name, (count, changed) in documents.items()},
        "pieces": [[token.id for token in splitter.tokenize("".join(pair))] for pair in merges],
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


def learn_merges(base: Path, texts: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Continue the merges of a tokenizer without a normalizer: each time the pair that occurs most often."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    known = set(tokenizer.get_vocab())
    words = Counter(word for text in texts for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    split = {word: [token.value for token in tokenizer.model.tokenize(word)] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, tokens in split.items():
            for pair in itertools.pairwise(tokens):
                pairs[pair] += words[word]
        best = next(pair for pair, _ in pairs.most_common() if "".join(pair) not in known)
        merges.append(best)
        known.add("".join(best))
        split = {word: _merged(tokens, best) for word, tokens in split.items()}
    return merges


def _merged(tokens: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def _write(directory: Path, content: Mapping[str, object]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    settings = {"eos_token": EOD, "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
