"""Every command checks all of its inputs and its output path before it writes the first byte."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_moe_lpr.checkpoint.format.writer import CheckpointWriter
from megatron_moe_lpr.conversion import exporter
from megatron_moe_lpr.data.indexed import IndexedWriter
from megatron_moe_lpr.errors import run_command
from tests.conversion.helpers import run
from tests.conversion.tiny_models import save_model
from tests.data.builders import EOD_TOKEN, make_hf_tokenizer, write_dataset, write_jsonl
from tests.evaluation.tools import load_tool


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with good inputs of all commands."""
    root = tmp_path_factory.mktemp("good")
    save_model("qwen2", root / "hf")
    for path in (root / "hf").glob("tokenizer*"):  # of the tests, and no real one
        path.unlink()
    run("import", "--hf", root / "hf", "--save", root / "checkpoint", "--num-experts", 3)
    run("export", "--load", root / "checkpoint", "--hf", root / "moe")
    make_hf_tokenizer(root / "tokenizer")
    for language in ("el", "en"):
        write_dataset(root / language, language, [[5, 6, 7, 0]] * 20)
    write_jsonl(root / "text.jsonl", ["one", "two"])
    return root


@pytest.fixture
def place(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the good inputs, in which writing output of any kind fails the test."""

    def written(*_: object, **__: object) -> None:
        raise AssertionError("output began before the input was checked")

    place = Path(shutil.copytree(good, tmp_path / "place"))
    monkeypatch.setattr(CheckpointWriter, "write", written)
    monkeypatch.setattr(exporter, "write_safetensors", written)
    monkeypatch.setattr(IndexedWriter, "append", written)
    monkeypatch.chdir(place)
    (place / "bad.json").write_text("{")
    (place / "other.json").write_text("{}")
    (place / "directory").mkdir()
    return place


IMPORT = "convert_hf import --hf hf --save out"
EXPORT = "convert_hf export --load checkpoint --hf out"
REPORT = "report --output out.html --evaluation"
ALLOCATE = "allocate_experts --load hf --data-path el en --original-languages en"
BENCHMARKS = "benchmarks --base hf --final moe --original-languages en --expanded-languages el --output"
PREPROCESS = "preprocess_data --input text.jsonl --language el --output-prefix out --workers 1 --tokenizer"
DOWNLOAD = "download_data --languages el=1 --output"
EVALUATE = "evaluate --load checkpoint --platform cpu --seq-length 32 --valid-data-path el --output"

CASES = {
    f"{IMPORT} --adapter directory": "directory/adapter_config.json: no such file",
    f"{IMPORT} --experts-per-layer missing.json": "missing.json: no such file",
    f"{IMPORT} --experts-per-layer other.json": "--experts-per-layer other.json: numbers of 1 or more",
    f"{IMPORT} --experts-per-layer out/e.json --overwrite": "out/e.json: no such file",
    f"{EXPORT} --evaluation missing.json": "missing.json: no such file",
    f"{EXPORT} --evaluation directory": "directory: cannot be read",
    f"{EXPORT} --evaluation bad.json": "bad.json: not valid JSON",
    f"{EXPORT} --evaluation other.json": "other.json: not a result of moe-lpr evaluate",
    f"{EXPORT} --evaluation words.json": "words.json: not a result of moe-lpr evaluate",
    f"{EXPORT} --max-shard-size many": "--max-shard-size many: a size",
    f"{EXPORT} --base-checkpoint missing": "--base-checkpoint missing",
    "convert_hf export --load checkpoint --hf moe --overwrite --evaluation moe/config.json": "must lie apart",
    "convert_hf export --load checkpoint --hf checkpoint/release/moe": "--hf checkpoint/release/moe: must lie apart",
    "convert_hf export --load checkpoint --hf checkpoint --overwrite": "--hf checkpoint: must lie apart",
    "convert_hf export --load checkpoint --hf alias/checkpoint --overwrite": "must lie apart",
    "convert_hf import --hf hf --save hf/out": "--save hf/out: must lie apart",
    "convert_hf import --hf hf --save out/.. --overwrite": "--save out/..: must lie apart",
    f"{IMPORT} --adapter directory --save directory/out": "must lie apart from --adapter",
    "convert_hf expand --load checkpoint --save out --add-experts some": "--add-experts some",
    f"{REPORT} A=missing.json": "missing.json: no such file",
    f"{REPORT} A=bad.json": "bad.json: a file of moe-lpr evaluate --output is expected: Invalid JSON",
    f"{REPORT} A=other.json": "other.json: a file of moe-lpr evaluate --output is expected: sequence_length: ",
    "report --output directory --evaluation A=other.json": "--output directory: is a directory",
    "report --output missing/out.html --evaluation A=other.json": "--output missing/out.html: there is no directory",
    f"{ALLOCATE} --output missing/out.json": "--output missing/out.json: there is no directory",
    f"{ALLOCATE} --output out.json --plot directory": "--plot directory: is a directory",
    f"{ALLOCATE} --output out.json --plot directory/../out.json": "name two files",
    f"{ALLOCATE} --output out.json --device toaster": "--device toaster: cannot be used here",
    "allocate_experts --load hf --data-path el missing --original-languages en --output out": "missing.json: no such",
    f"{BENCHMARKS} other.json": "--output other.json: is a file",
    f"{BENCHMARKS} out --include-path missing": "--include-path missing: no such directory",
    f"{BENCHMARKS} out --launcher no-such-command": "--launcher: there is no command no-such-command",
    f"{BENCHMARKS} full": "--output full/benchmarks.json: is a directory",
    f"{PREPROCESS} missing": "missing: no such tokenizer",
    f"{PREPROCESS} no-eos --no-append-eod": "pass --eod-token",
    f"{PREPROCESS} bad-model": "config.json: not valid JSON",
    f"{PREPROCESS} tokenizer --input text.jsonl missing.jsonl": "--input missing.jsonl: no such file",
    f"{PREPROCESS} tokenizer --input text.jsonl bad.jsonl.gz": "bad.jsonl.gz: damaged or truncated",
    f"{PREPROCESS} tokenizer --input text.jsonl bad.jsonl.zst": "bad.jsonl.zst: damaged or truncated",
    f"{PREPROCESS} tokenizer --output-prefix unmounted/out": "unmounted is a symbolic link to",
    "report --output sub/../other.json --evaluation A=other.json": "is an input, other.json, which it would replace",
    "report --output words.json --evaluation A=other.json --samples words.json": "is an input, words.json",
    f"{EVALUATE} el.json": "--output el.json: is an input, el.json",
    f"{ALLOCATE} --output alias/en.bin": "--output alias/en.bin: is an input, en.bin",
    "merge_datasets --input el --output-prefix alias/el --overwrite": "--output-prefix alias/el: is an input too",
    f"{PREPROCESS} tokenizer --input el.json --output-prefix alias/el --overwrite": "would replace the input",
    "merge_datasets --input el missing --output-prefix out": "missing.json: no such file",
    "merge_datasets --input el en --output-prefix out": "they can't be mixed",
    f"{DOWNLOAD} other.json": "--output other.json: is a file",
    f"{DOWNLOAD} out --corpus el=unheard-of": "--corpus el=unheard-of: choose among",
    f"{DOWNLOAD} out --corpus hu=culturax": "--languages does not ask for hu",
    "build_index --data-path missing --seq-length 8 --train-samples 4": "missing.json: no such file",
    f"{EVALUATE} directory": "--output directory: is a directory",
    f"{EVALUATE} out.json --valid-data-path missing": "missing.json: no such file",
}


def prepare(place: Path) -> None:
    """Make the bad inputs that need a file."""
    dataset = {"language": "el", "group": "expanded", "perplexity": "high", "bits_per_byte": 1.0}
    (place / "words.json").write_text(json.dumps({"sequence_length": 8, "datasets": [dataset]}))
    for name in ("bad.jsonl.gz", "bad.jsonl.zst"):
        (place / name).write_bytes(b"not compressed")
    (place / "alias").symlink_to(".")
    (place / "sub").mkdir()
    (place / "unmounted").symlink_to("disk")
    (place / "full" / "benchmarks.json").mkdir(parents=True)
    for name in ("no-eos", "bad-model"):
        shutil.copytree(place / "tokenizer", place / name)
    (place / "no-eos" / "tokenizer_config.json").unlink()
    (place / "bad-model" / "config.json").write_text("{")


@pytest.mark.parametrize("line", CASES)
def test_bad_input(line: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(place)
    name, *arguments = line.split()
    main: Callable[[], None] = load_tool(name).main
    before = sorted(place.rglob("*"))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert stop.value.code in (1, 2) and len(errors) == 1
    assert CASES[line] in errors[0], errors
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("name", ["preprocess", "import", "export"])
def test_a_file_that_cannot_be_read(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "hf" / "NOTICE").write_text("mine")
    lines = {
        "preprocess": (f"{PREPROCESS} tokenizer", "text.jsonl"),
        "import": (IMPORT, "NOTICE"),
        "export": (f"{EXPORT} --no-verify", "NOTICE"),
    }
    line, hidden = lines[name]
    if name == "export":
        (place / "checkpoint" / "release" / "moe_lpr" / "NOTICE").write_text("mine")
    opened = open

    def refusing(file: object, *arguments: object, **names: object) -> object:
        if str(file).endswith(hidden):
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *arguments, **names)

    before = sorted(place.rglob("*"))
    tool, *arguments = line.split()
    main = load_tool(tool).main
    monkeypatch.setattr("builtins.open", refusing)
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    with pytest.raises(SystemExit):
        run_command(main)
    assert f"{hidden}: Permission denied" in capsys.readouterr().err
    assert sorted(place.rglob("*")) == before


def test_the_tokenizer_of_these_tests_has_an_end_of_document(good: Path) -> None:
    """Otherwise a case above would fail for another reason."""
    assert EOD_TOKEN in (good / "tokenizer" / "tokenizer_config.json").read_text()
