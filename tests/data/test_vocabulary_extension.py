"""Reading `extension.json`, which may come from anywhere."""

import json
from pathlib import Path

import pytest

from megatron_moe_lpr.checkpoint.format.card import EarlierTokenizer
from megatron_moe_lpr.data.tokenizer import load_tokenizer, model_vocabulary
from megatron_moe_lpr.data.tokenizer_extension import TokenizerExtension, read_extension
from megatron_moe_lpr.data.vocabulary_extension import tokenizers_before, unchanged_languages
from megatron_moe_lpr.errors import UserError
from tests.data.extended_tokenizers import FIRST_MERGES, ROWS, SECOND_MERGES, TEXT, extend, make_base

RECORD = {
    "format": 1,
    "base_vocab_size": 10,
    "new_tokens": 2,
    "base_tokenizer_fingerprint": "aa",
    "tokenizer_fingerprint": "bb",
    "guarded": {"English": {"documents": 9, "changed": 0}},
    "pieces": [[1, 2], [3, 4, 9]],
}


def write(directory: Path, **changes: object) -> Path:
    directory.mkdir(exist_ok=True)
    fields = {name: value for name, value in (RECORD | changes).items() if value is not ...}
    (directory / "extension.json").write_text(json.dumps(fields))
    return directory


def read(directory: Path) -> TokenizerExtension:
    extension = read_extension(directory)
    assert extension is not None
    return extension


def test_what_is_read(tmp_path: Path) -> None:
    inner = {name: value for name, value in RECORD.items() if name != "format"}
    found = read(write(tmp_path, earlier=[RECORD, inner | {"earlier": []}]))
    assert (found.base_vocab_size, found.new_tokens, found.vocab_size) == (10, 2, 12)
    assert (found.base_tokenizer_fingerprint, found.tokenizer_fingerprint) == ("aa", "bb")
    assert found.pieces == [[1, 2], [3, 4, 9]] and len(found.earlier) == 2


@pytest.mark.parametrize(
    ("guarded", "unchanged"),
    [
        ({"en": (9, 0), "es": (9, 1), "zh": (0, 0)}, ["en"]),
        ({"en": (9, 0), "English": (9, 1)}, []),
        ({"ell": (3, 0), "Turkish": (1, 0)}, ["el", "tr"]),
    ],
)
def test_unchanged_languages(guarded: dict, unchanged: list[str], tmp_path: Path) -> None:
    fields = {name: {"documents": count, "changed": changed} for name, (count, changed) in guarded.items()}
    assert unchanged_languages(read(write(tmp_path, guarded=fields))) == unchanged


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"pieces": ...},
        {"base_vocab_size": 0},
        {"base_vocab_size": "10"},
        {"base_vocab_size": True},
        {"new_tokens": 0, "pieces": []},
        {"new_tokens": 3},
        {"base_tokenizer_fingerprint": None},
        {"tokenizer_fingerprint": 5},
        {"guarded": []},
        {"guarded": {"en": 0}},
        {"guarded": {"en": {"documents": 3}}},
        {"guarded": {"en": {"documents": 3, "changed": 4}}},
        {"guarded": {"en": {"documents": 3, "changed": -1}}},
        {"pieces": [[1], []]},
        {"pieces": [[1], [-2]]},
        {"pieces": [[1], [2.0]]},
        {"pieces": "12"},
        {"pieces": [[1], [10]]},
        {"earlier": 3},
        {"earlier": [3]},
        {"earlier": [{"format": 1}]},
    ],
)
def test_records_that_are_none(changes: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"extension\.json: ") as error:
        read_extension(write(tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1, "format": 1}'])
def test_files_that_are_no_record(text: str, tmp_path: Path) -> None:
    (tmp_path / "extension.json").write_text(text)
    with pytest.raises(UserError, match=r"extension\.json"):
        read_extension(tmp_path)


def test_datasets_stay_valid_where_no_extension_changed_their_language(tmp_path: Path) -> None:
    extension = read(write(tmp_path, guarded={"en": {"documents": 1, "changed": 0}}))
    before = [EarlierTokenizer("00", ["en-GB", "es"])]
    assert tokenizers_before(extension, before) == [EarlierTokenizer("00", ["en-GB"]), EarlierTokenizer("aa", ["en"])]


def test_ids_of_a_checkpoint_are_those_of_the_dense_model_and_the_new_ones(tmp_path: Path) -> None:
    """Preprocessing compares token ids with the config.json beside the tokenizer."""
    base = make_base(tmp_path / "base")
    first = extend(base, tmp_path / "first")
    second = extend(first, tmp_path / "second", SECOND_MERGES, ROWS + len(FIRST_MERGES))
    for place, expected in ((base, 99), (first, 106), (second, 109)):
        (place / "config.json").write_text('{"vocab_size": 99}')
        assert model_vocabulary(place / "tokenizer.json") == expected
    assert max(load_tokenizer(second).encode_batch([TEXT])[0]) == 106
    (second / "config.json").write_text('{"vocab_size": 200}')
    assert model_vocabulary(second / "tokenizer.json") == 200
