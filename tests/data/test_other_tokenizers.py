"""Tokenizers of other forms: the message names a way out, which is then taken here, and the ids are those."""

import base64
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, TokenizersBackend
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.mistral import MistralConverter

from megatron_moe_lpr.data.tokenizer import load_tokenizer
from megatron_moe_lpr.errors import UserError

TEXTS = ["Γειά σου, κόσμε", "a\nb", "some text of the corpus", " two  spaces "]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"


def message(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_tokenizer(path).encode_batch(["a"])
    return str(error.value)


def test_vocabulary_and_merges(hf_tokenizer: Path, tmp_path: Path) -> None:
    model = json.loads((hf_tokenizer / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    assert "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)" in message(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    reference.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode_batch(TEXTS) == [reference.encode(text) for text in TEXTS]


def test_tekken(hf_tokenizer: Path, tmp_path: Path) -> None:
    model = json.loads((hf_tokenizer / "tokenizer.json").read_text())["model"]
    to_byte = {letter: number for number, letter in bytes_to_unicode().items()}
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])][1:]
    rows = [base64.b64encode(bytes(to_byte[letter] for letter in token)).decode() for token in tokens]
    special = [{"rank": rank, "token_str": text} for rank, text in enumerate(("<unk>", "<s>", "</s>"))]
    config = {"pattern": r"\s?\p{L}+|\s?[^\s\p{L}]+|\s+", "default_num_special_tokens": len(special)}
    vocabulary = [{"rank": rank, "token_bytes": row, "token_str": None} for rank, row in enumerate(rows)]
    (tmp_path / "tekken.json").write_text(
        json.dumps({"config": config, "vocab": vocabulary, "special_tokens": special})
    )
    line = message(tmp_path)
    assert "tekken.json" in line and "MistralConverter('tekken.json').converted()" in line
    converted = MistralConverter(str(tmp_path / "tekken.json")).converted()
    TokenizersBackend(tokenizer_object=converted).save_pretrained(tmp_path)
    ids = load_tokenizer(tmp_path).encode_batch(TEXTS)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert ids == [reference.encode(text) for text in TEXTS] and reference.decode(ids[0]) == TEXTS[0]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["qwen.tiktoken"], "Qwen 1.5"),
        (["vocab.txt"], "AutoTokenizer.from_pretrained(DIR)"),
        (["config.json", "model.safetensors"], "copy the tokenizer's files"),
        ([], "holds neither a tokenizer.json nor a SentencePiece .model"),
    ],
)
def test_other_forms(files: list[str], words: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    assert words in message(tmp_path)


def test_tiktokens_form_of_a_model_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(base64.b64encode(b"a") + b" 0\n" + base64.b64encode(b"b") + b" 1\n")
    assert "tiktoken's form" in message(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_git_lfs_pointers(name: str, hf_tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_tokenizer, tmp_path / "clone")
    (tmp_path / "clone" / "tokenizer.json").unlink()
    (tmp_path / "clone" / name).write_text(POINTER)
    assert f"{name}: is a Git LFS pointer" in message(tmp_path / "clone") and "git lfs pull" in message(
        tmp_path / "clone"
    )
