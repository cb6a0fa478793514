"""The comparison with and without new tokens: equal bytes of text, seconds of a run, and the commands of both arms."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
import zstandard

from tests.conversion.extended import make_tokenizers, save_with_tokenizer
from tests.data.extended_tokenizers import TEXT

sys.path.append(str(Path(__file__).parents[2] / "examples" / "demo"))
import initial_rows
import vocabulary
import vocabulary_reviews
from settings import Settings
from workflow import Workflow

TOKENS = {"train-el": (300, 100), "train-hu": (200, 100), "train-tr": (100, 100)}
"""Bytes and tokens of each dataset of the old tokenizer."""


def write_manifest(prefix: Path, text_bytes: int, tokens: int) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.json").write_text(json.dumps({"text_bytes": text_bytes, "tokens": tokens}))


def test_bytes_of_a_token(tmp_path: Path) -> None:
    """Stage 1 draws in proportion to tokens, the review by weights: 1 for each replay of 4, 5, 6 bytes a token."""
    flow = Workflow(Settings(runs=tmp_path))
    for name, (size, tokens) in TOKENS.items():
        write_manifest(tmp_path / "data" / name, size, tokens)
    for name, size in (("en", 40), ("es", 50), ("zh", 60)):
        write_manifest(tmp_path / "data" / f"replay-{name}", size, 10)
    assert vocabulary.stage1_bytes(flow) == 600 / 300
    assert vocabulary.review_bytes(flow) == pytest.approx((4 + 5 + 6 + 2 * (3 + 2 + 1)) / 9)


def test_seconds_of_a_run(tmp_path: Path) -> None:
    """20 steps of 10 tokens at 100 tokens/s, then 5 at 25; a validation between them does not count."""
    lines = [
        {"kind": "train", "iteration": 20, "tokens_per_second": 100.0},
        {"kind": "valid/el", "iteration": 20, "lm_loss": 1.0},
        {"kind": "train", "iteration": 25, "tokens_per_second": 25.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert vocabulary.training_seconds(tmp_path / "metrics.jsonl", 10) == pytest.approx(2.0 + 2.0)


class Recorder:
    """In place of the commands: notes their words and writes what the steps after them read."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def __call__(self, flow: Workflow, *words: object, **_: str) -> None:
        command = [str(word) for word in words]
        self.commands.append(command)
        value = dict(itertools.pairwise(command))
        if "tools/preprocess_data.py" in command:
            # The extended tokenizer needs half of the tokens for a new language.
            short = value["--tokenizer"].endswith("tokenizer") and value["--language"] in ("el", "hu", "tr")
            write_manifest(Path(value["--output-prefix"]), 1200, 200 if short else 400)
        elif "tools/evaluate.py" in command:
            mass = 0.25 if "with" in Path(value["--load"]).parts else None
            averages = {key: {"bits_per_byte": 2.0, "new_token_mass": mass} for key in ("original", "expanded")}
            Path(value["--output"]).write_text(json.dumps({"averages": averages}))
        elif "examples/demo/costs.py" in command:
            cost = {"generated_tokens_per_second": 10.0, "parameters": 7}
            costs = dict.fromkeys(vocabulary.TITLES.values(), cost)
            Path(value["--output"]).write_text(json.dumps(costs))
        elif "megatron_moe_lpr.pretrain" in command:
            save = Path(value["--save"])
            save.mkdir(parents=True)
            line = {"kind": "train", "iteration": int(value["--train-iters"]), "tokens_per_second": 2048.0}
            (save / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def replace_commands(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workflow, "run", lambda *words, **environment: recorder(*words, **environment))
    for name, text in {"RUNS": str(tmp_path / "runs"), "STAGE1_ITERS": "280", "STAGE2_ITERS": "900"}.items():
        monkeypatch.setenv(name, text)
    for name in ("TOKENIZER", "DATA", "EXPANDED", "ORIGINAL", "NEW_TOKENS"):
        monkeypatch.delenv(name, raising=False)


def test_both_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder()
    replace_commands(recorder, tmp_path, monkeypatch)
    vocabulary.vocabulary()
    printed = capsys.readouterr().out
    steps = {
        (Path(command[command.index("--save") + 1]).parts[-2:]): int(command[command.index("--train-iters") + 1])
        for command in recorder.commands
        if "megatron_moe_lpr.pretrain" in command
    }
    # Of the review's tokens a third is replay, of 3 bytes a token in both arms; new languages have 3 and 6.
    assert steps == {
        ("without", "stage1"): 280,
        ("without", "stage2"): 900,
        ("with", "stage1"): 140,
        ("with", "stage2"): round(900 * 3 / 5),
        ("with", "frozen"): round(900 * 3 / 5),
    }
    frozen = next(command for command in recorder.commands if any(word.endswith("/frozen") for word in command))
    assert "--no-train-new-rows" in frozen
    imports = {command[command.index("--save") + 1]: command for command in recorder.commands if "import" in command}
    extended = {Path(save).parts[-2:]: "--tokenizer" in command for save, command in imports.items()}
    assert extended == {("without", "base"): False, ("without", "moe"): False, ("with", "moe"): True}
    found = json.loads((tmp_path / "runs" / "vocabulary.json").read_text())
    assert found["old vocabulary"]["stage1_tokens"] == 2 * found["new tokens"]["stage1_tokens"]
    assert found["new tokens"]["stage1_seconds"] == pytest.approx(140)
    assert [one.get("generated_bytes_per_second") for one in found.values()] == [30, 60, None]
    assert [one.get("original_new_token_mass") for one in found.values()] == [None, 0.25, 0.25]
    assert all(title.split(",")[0] in printed for title in found) and printed.count("0.25") == 4
    assert (tmp_path / "runs" / "tokenizer" / "extension.json").exists()


def test_reviews_from_one_stage_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As long as the review of the arm with new tokens; each differs in its flags."""
    recorder = Recorder()
    replace_commands(recorder, tmp_path, monkeypatch)
    vocabulary_reviews.vocabulary_reviews()
    trained = [command for command in recorder.commands if "megatron_moe_lpr.pretrain" in command]
    stage1, *reviews = trained
    assert len(reviews) == len(vocabulary_reviews.REVIEWS) and len(set(map(tuple, reviews))) == len(reviews)
    for review, flags in zip(reviews, vocabulary_reviews.REVIEWS.values(), strict=True):
        start, length = review[review.index("--load") + 1], int(review[review.index("--train-iters") + 1])
        assert (start, length) == (stage1[stage1.index("--save") + 1], round(900 * 3 / 5))
        assert set(flags) <= set(review)
    found = json.loads((tmp_path / "runs" / "reviews.json").read_text())
    assert list(found) == ["stage 1", *vocabulary_reviews.REVIEWS]
    printed = capsys.readouterr().out
    assert all(title in printed for title in found) and "0.2500" in printed


def test_mass_and_loss_of_zero_states() -> None:
    """All tokens are equally likely: new ones take their share, and the loss is the logarithm of their number."""
    hidden, old, new = torch.zeros(2, 5, 4), torch.randn(6, 4), torch.randn(2, 4)
    assert initial_rows.mass(hidden, old, new) == pytest.approx(2 / 8)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    assert initial_rows.loss(hidden, torch.cat([old, new]), ids) == pytest.approx(2.0794, abs=1e-4)


def test_rows_that_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizers = make_tokenizers(tmp_path / "tokenizers")
    dense = save_with_tokenizer("llama", tmp_path / "dense", tokenizers)
    (tmp_path / "valid").mkdir()
    for name in ("en", "el"):
        line = json.dumps({"text": " ".join([TEXT] * 5)}) + "\n"
        (tmp_path / "valid" / f"{name}.jsonl.zst").write_bytes(zstandard.compress(line.encode() * 4))
    flags = ["--hf", dense, "--tokenizer", tokenizers / "first", "--corpus", tmp_path, "--original", "en"]
    initial_rows.main([str(flag) for flag in (*flags, "--expanded", "el", "--windows", 2, "--length", 16)])
    printed = capsys.readouterr().out
    assert "mass en" in printed and "loss el" in printed and printed.count(" mean + ") == 16
