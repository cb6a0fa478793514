"""Each mistake ends in one line that names it, and leaves no output."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megatron_moe_lpr.commands import extend_tokenizer
from megatron_moe_lpr.data.tokenizer_extension import read_extension
from megatron_moe_lpr.errors import UserError, run_command
from tests.data.builders import corpus_texts, make_sentencepiece, write_jsonl
from tests.vocabulary.builders import make_byte_level, write_model

COMMAND = "--hf base --output out --workers 1 --new-tokens 10 --learn el=el.jsonl"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    make_byte_level(root / "base")
    for language in ("el", "en"):
        write_jsonl(root / f"{language}.jsonl", corpus_texts("valid", language)[:40])
    write_jsonl(root / "short.jsonl", ["one"])
    (root / "bad.jsonl").write_text("{\n")
    (root / "empty.jsonl").write_text("")
    (root / "full").mkdir()
    (root / "full" / "file").write_text("")
    return root


@pytest.fixture
def place(good, tmp_path, monkeypatch):
    path = shutil.copytree(good, tmp_path / "place")
    monkeypatch.chdir(path)
    return path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--learn hu=missing.jsonl", "--learn hu missing.jsonl: no such file"),
        ("--learn el=el.jsonl el=el.jsonl", "--learn el el.jsonl: given twice"),
        ("--learn el.jsonl", "--learn el.jsonl: write LANGUAGE=FILES"),
        ("--learn el=", "--learn el=: give files"),
        ("--learn qx=el.jsonl", "--learn qx: no known language code"),
        ("--learn greke=el.jsonl", "--learn greke: no language of this name is known; write el"),
        ("--learn el=-", "standard input cannot be read twice"),
        ("--learn el=full", "is a directory"),
        ("--guard el=en.jsonl", "--guard el: is learned too"),
        ("--guard el-GR=en.jsonl", "--guard el-GR: is learned too"),
        ("--guard en=el.jsonl", "el.jsonl: given for el and for en"),
        ("--learn el=short.jsonl", "--learn el: the text is too short"),
        ("--learn el=empty.jsonl", "--learn el: the text is too short"),
        ("--guard en=short.jsonl", "--guard en: the text is too short"),
        ("--learn el=bad.jsonl", "bad.jsonl:1: malformed JSON"),
        ("--json-key content", "no text under the key 'content'"),
        ("--language-weights en=2", "--language-weights en=2: write LANGUAGE=NUMBER with one of el"),
        ("--language-weights el=0", "the weight must be a number above 0"),
        ("--language-weights el=nan", "the weight must be a number above 0"),
        ("--language-weights el=1 el=2", "el is given twice"),
        ("--new-tokens 100000", "gives only"),
        ("--new-tokens 2000000", "cannot be learned here"),
        ("--output full", "full: exists and is not empty; choose another directory or pass --overwrite"),
        ("--output base/new", "--output base/new: must lie apart"),
        ("--hf missing/and/more", "--hf missing/and/more: no such directory"),
        ("--hf base/tokenizer.json", "is a file; give its directory"),
        ("--hf full", "full: holds neither a tokenizer.json"),
    ],
)
def test_a_mistake_is_one_line(flags, message, place, capsys):
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: extend_tokenizer.main([*COMMAND.split(), *flags.split()]))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code and len(lines) == 1 and message in lines[0], lines
    assert sorted(place.rglob("*")) == before


def make_trained(model, trainer, directory):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(corpus_texts("valid", "en")[:5], trainer)
    return write_model(directory, {"tokenizer.json": json.loads(tokenizer.to_str())})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Unigram", "a Unigram tokenizer cannot be extended: it chooses pieces by their probability"),
        ("WordPiece", "a WordPiece tokenizer cannot be extended: it takes the longest known piece"),
        ("WordLevel", "a WordLevel tokenizer cannot be extended: it knows whole words"),
        ("BPE", "without byte fallback cannot be extended"),
        ("end of word", "a BPE tokenizer with end_of_word_suffix cannot be extended"),
    ],
)
def test_other_kinds_are_refused_with_the_reason(kind, message, place, capsys):
    quiet = {"vocab_size": 300, "show_progress": False}
    model, trainer = {
        "Unigram": (models.Unigram(), trainers.UnigramTrainer(**quiet)),
        "WordPiece": (models.WordPiece(unk_token="?"), trainers.WordPieceTrainer(special_tokens=["?"], **quiet)),
        "WordLevel": (models.WordLevel(unk_token="?"), trainers.WordLevelTrainer(special_tokens=["?"], **quiet)),
        "BPE": (models.BPE(), trainers.BpeTrainer(**quiet)),
        "end of word": (
            models.BPE(end_of_word_suffix="</w>"),
            trainers.BpeTrainer(end_of_word_suffix="</w>", **quiet),
        ),
    }[kind]
    make_trained(model, trainer, place / "other")
    with pytest.raises(UserError, match=message):
        extend_tokenizer.main([*COMMAND.split(), "--hf", "other"])


def test_a_unigram_sentencepiece_model_is_refused(place):
    make_sentencepiece(place / "other", "unigram")
    with pytest.raises(UserError, match=r"tokenizer\.model: a Unigram tokenizer cannot be extended"):
        extend_tokenizer.main([*COMMAND.split(), "--hf", "other"])


def test_a_model_with_fewer_rows_than_tokens_is_refused(place):
    write_model(place / "base", {"config.json": {"vocab_size": 500}})
    with pytest.raises(UserError, match=r"config\.json: vocab_size is 500, and the tokenizer beside it has ids up to"):
        extend_tokenizer.main(COMMAND.split())


def test_a_tokenizer_without_the_model_says_what_it_assumes(place, capsys):
    (place / "base" / "config.json").unlink()
    extend_tokenizer.main(COMMAND.split())
    assert "no config.json with a vocab_size beside it; new ids begin at 603" in capsys.readouterr().err
    assert read_extension(place / "out").base_vocab_size == 603


def test_a_damaged_record_is_named(place):
    extend_tokenizer.main(COMMAND.split())
    for change in ({"pieces": []}, {"base_vocab_size": -1}, {"guarded": {"en": {}}}, {"format": 2}, {"earlier": [1]}):
        fields = json.loads((place / "out" / "extension.json").read_text())
        (place / "other").mkdir(exist_ok=True)
        (place / "other" / "extension.json").write_text(json.dumps({**fields, **change}))
        with pytest.raises(UserError, match=r"other/extension\.json: "):
            read_extension(place / "other")
    shutil.copy(place / "out" / "extension.json", place / "base")
    with pytest.raises(UserError, match=r"not the tokenizer that extension\.json beside it describes"):
        extend_tokenizer.main([*COMMAND.split(), "--output", "again"])


def test_bad_lines_can_be_skipped(place, capsys):
    with open(place / "el.jsonl", "a", encoding="utf-8") as file:
        file.write("{\n")
    extend_tokenizer.main([*COMMAND.split(), "--on-error", "skip"])
    assert "el: skipped: 1 malformed (first: el.jsonl:41: malformed JSON" in capsys.readouterr().err
