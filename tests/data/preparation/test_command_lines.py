"""The tools as a user starts them: one clear line and an exit code for bad input."""

import io
import json
import os
import runpy
import sys
from pathlib import Path

import pytest

from tests.data.builders import CORPUS, run_plan, write_jsonl
from tests.data.test_beginning_of_text import with_bos

TOOLS = Path(__file__).parents[3] / "tools"


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run a tool in this process: (exit code, standard output, standard error)."""
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(TOOLS / name), run_name="__main__")
        except SystemExit as error:
            code = error.code
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def test_preprocess_merge_inspect(tool, hf_tokenizer, tmp_path):
    common = ["--tokenizer", hf_tokenizer, "--language", "el", "--workers", 1]
    source = write_jsonl(tmp_path / "a.jsonl", ["κόσμε [bold]x[/bold]", "Γειά σου"])
    for index in (1, 2):
        arguments = ["--input", source, "--output-prefix", tmp_path / "p", "--partitions", f"{index}/2"]
        code, out, err = tool("preprocess_data.py", *arguments, *common)
        assert code == 0 and "p-0000" in out and "documents/s" in err
    code, out, _ = tool("merge_datasets.py", "--input", tmp_path / "p-*", "--output-prefix", tmp_path / "all")
    assert code == 0 and "all: el, 2 documents" in out
    code, out, _ = tool("inspect_data.py", "--input", tmp_path / "all", "--tokenizer", hf_tokenizer)
    assert code == 0 and "Γειά σου" in out and "κόσμε [bold]x[/bold]" in out


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_a_bos_that_documents_begin_without_is_named(kind, tool, hf_tokenizer, tmp_path):
    directory = with_bos(hf_tokenizer, tmp_path / "llama") if kind == "llama" else hf_tokenizer
    texts = write_jsonl(tmp_path / "texts.jsonl", ["some text"])
    arguments = ["--input", texts, "--output-prefix", tmp_path / "data", "--tokenizer", directory, "--language", "en"]
    code, _, err = tool("preprocess_data.py", *arguments, "--workers", 1)
    assert code == 0 and ("documents begin without <|begin|>" in err) == (kind == "llama")


def test_standard_input(tool, hf_tokenizer, tmp_path, monkeypatch):
    lines = "".join(json.dumps({"text": f"document {index}"}) + "\n" for index in range(50))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    arguments = ["--input", "-", "--output-prefix", tmp_path / "x", "--tokenizer", hf_tokenizer, "--language", "en"]
    code, out, _ = tool("preprocess_data.py", *arguments)
    assert code == 0 and "50 documents" in out


def test_language_in_other_spellings(tool, hf_tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    cases = {"EN": ("en", "EN is read as en (English)"), "Greek": ("el", "Greek is read as el")}
    for name, (word, note) in {**cases, "code": ("code", "tag of your own")}.items():
        arguments = ["--input", source, "--output-prefix", tmp_path / word, "--tokenizer", hf_tokenizer, "--workers", 1]
        code, out, err = tool("preprocess_data.py", *arguments, "--language", name)
        assert code == 0 and f"{word}: {word}, 1 documents" in out and note in err


def test_misspelled_languages_of_documents_are_named(tool, hf_tokenizer, tmp_path):
    documents = [{"text": "one", "lang": name} for name in ("Englsh", "English", "en", "code")]
    arguments = ["--input", write_jsonl(tmp_path / "a.jsonl", documents), "--output-prefix", tmp_path / "x"]
    code, out, err = tool(
        "preprocess_data.py", *arguments, "--tokenizer", hf_tokenizer, "--workers", 1, "--language-key", "lang"
    )
    assert code == 0 and "x_en: en, 2 documents" in out
    assert "Englsh is no known language; write en if you mean en (English)" in err
    assert "kept: 1 kept_with_language_English_read_as_en" in err and "code is no known language\n" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--language", "el", "--language-key", "lang"], "either --language"),
        (["--language", "Englsh"], "--language Englsh: no language of this name is known; write en if you mean en"),
        (["--language", "en,el"], "--language 'en,el': one language"),
        ([], "either --language"),
        (["--language", "../x"], "--language '../x'"),
        (["--language-key", "lang"], "a.jsonl:1: no language under the key 'lang'"),
        (["--language", "el", "--json-key", "body"], "a.jsonl:1: no text under the key 'body'"),
        (["--language", "el", "--partitions", "0/3"], "--partitions 0/3: write I/N"),
        (["--language", "el", "--partitions", "3"], "--partitions 3: write I/N"),
        (["--language", "el", "--partitions", "1/2", "--shuffle-seed", "1"], "--shuffle-seed: acts on the whole"),
        (["--language", "el", "--partitions", "1/2", "--max-documents", "1"], "--max-documents: acts on the whole"),
        (["--language", "el", "--max-line-bytes", "5"], "a.jsonl:1: longer than 5 bytes (--max-line-bytes)"),
        (["--language", "el", "--eod-token", "<none>"], "the EOD token '<none>' is not in the vocabulary"),
        (["--language", "el", "--input", "none*.jsonl"], "--input none*.jsonl: no such file"),
        (["--language", "el", "--tokenizer", "none"], "none: no such tokenizer"),
    ],
)
def test_bad_flags_are_one_clear_line(tool, hf_tokenizer, tmp_path, arguments, message):
    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    given = {"--input": source, "--output-prefix": tmp_path / "out" / "x", "--tokenizer": hf_tokenizer, "--workers": 1}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    code, _, err = tool("preprocess_data.py", *(part for pair in given.items() for part in pair))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and message in errors[0] and "Traceback" not in err
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []


def test_wrong_tokenizer_for_samples(tool, hf_tokenizer, sp_model, tmp_path):
    run_plan(CORPUS / "valid" / "el.jsonl.zst", tmp_path / "x", hf_tokenizer)
    code, out, err = tool("inspect_data.py", "--input", tmp_path / "x", "--tokenizer", sp_model)
    assert code == 1 and "40" in out
    assert err.splitlines()[-1].startswith("error: ") and "was made with another tokenizer" in err


def test_bad_blend(tool, tmp_path):
    arguments = ["--data-path", "1", "a", "x", "b", "--seq-length", 8, "--train-samples", 8]
    code, _, err = tool("build_index.py", *arguments)
    assert code == 1 and err == "error: --data-path: weight 'x' (of b) is not a number; write `weight prefix` pairs\n"
