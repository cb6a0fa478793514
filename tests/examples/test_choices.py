"""The demo's multiple-choice task for lm_eval."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.builders import corpus_texts

DEMO = Path(__file__).parents[2] / "examples" / "demo"
LANGUAGES = ("es", "zh")


def make(output: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Run make_choices.py."""
    command = [sys.executable, DEMO / "make_choices.py", "--output", output, *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("choices") / "task"
    result = make(output, "--corpus", "data/help_corpus/valid", "--languages", *LANGUAGES, "--questions", 30)
    assert result.returncode == 0, result.stderr
    return output


@pytest.mark.parametrize("language", LANGUAGES)
def test_only_the_right_ending_continues_the_passage(task: Path, language: str) -> None:
    documents = corpus_texts("valid", language)
    questions = [json.loads(line) for line in (task / f"{language}.jsonl").read_text().splitlines()]
    assert len(questions) == 30
    for question in questions:
        whole = [question["context"] + choice for choice in question["choices"]]
        found = [any(text in document for document in documents) for text in whole]
        assert found == [index == question["answer"] for index in range(4)]
        assert {len(choice) for choice in question["choices"]} == {40}
    assert len({question["answer"] for question in questions}) == 4


def test_the_task_names_its_own_file(task: Path) -> None:
    text = (task / "continuation_zh.yaml").read_text()
    assert "task: continuation_zh\n" in text and f'test: "{task / "zh.jsonl"}"' in text


def test_too_few_documents(tmp_path: Path) -> None:
    (tmp_path / "xx.jsonl.zst").write_bytes(b"")
    result = make(tmp_path / "task", "--corpus", tmp_path, "--languages", "xx")
    assert result.returncode != 0 and not (tmp_path / "task").exists()
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
