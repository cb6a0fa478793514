"""`make test-serving` without its engines: what fails is a line of the table, and the rest is still asked."""

import argparse
from pathlib import Path

import pytest

from tests.serving import compare, models
from tests.serving.reference import Continuation
from tests.serving.report import Report

GOOD = [Continuation([1, 2], [-0.5, -0.25]), Continuation([3], [-1.0])]


def compared(ours: list[Continuation]) -> Report:
    report = Report()
    report.compare("model", "engine", lambda: ours, GOOD)
    return report


def test_equal_continuations_are_good() -> None:
    report = compared(GOOD)
    assert not report.failed
    assert report.rows == [("model", "engine", "3 of 3", "0.0e+00 over 3", "good")]


@pytest.mark.parametrize(
    "first",
    [
        Continuation([1, 9], [-0.5, -0.25]),
        Continuation([1], [-0.5]),
        Continuation([1, 2], [-0.5, -0.26]),
        Continuation([1, 2], [-0.5, float("nan")]),
        Continuation([1, 2], [None, None]),
    ],
)
def test_another_token_or_number_is_wrong(first: Continuation) -> None:
    report = compared([first, GOOD[1]])
    assert report.failed and report.rows[0][-1] == "WRONG"


def test_a_prompt_without_an_answer_is_wrong() -> None:
    for ours in ([], GOOD[:1]):
        assert compared(ours).rows[0][-1] == "WRONG"


def flags() -> argparse.Namespace:
    return argparse.Namespace(vllm=Path("/vllm"), llama_cpp=Path("/llama_cpp"), transformers4=Path("/transformers4"))


def test_an_engine_that_fails_is_a_line_and_the_others_are_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("convert_to_gguf.py ended with 1:\nTraceback\nNotImplementedError: no such tensor")

    monkeypatch.setattr(compare.models, "make", lambda _, place: place)
    monkeypatch.setattr(compare, "by_transformers", lambda _: GOOD)
    monkeypatch.setattr(compare, "by_megatron", lambda *_: GOOD)
    monkeypatch.setattr(compare, "by_transformers4", lambda *_: GOOD)
    monkeypatch.setattr(compare, "by_llama_cpp", fail)
    monkeypatch.setattr(compare, "by_vllm", lambda *_: GOOD)
    report = Report()
    compare.compare_model(report, flags(), models.MODELS[0], tmp_path)
    assert report.failed
    assert [row[-1] for row in report.rows] == ["good", "good", "FAILED", "good"]
    assert report.rows[2][1:4] == ("llama.cpp", "", "RuntimeError: NotImplementedError: no such tensor")


def test_a_model_that_is_refused_is_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    served = models.Served("wrong", "qwen2", {"num_key_value_heads": 4}, "[0,0,2]")
    report = Report()
    compare.compare_model(report, flags(), served, tmp_path)
    assert report.failed and len(report.rows) == 1
    assert "--moe-layer-freq" in report.rows[0][3] and report.rows[0][4] == "FAILED"


def test_the_run_ends_in_exit_code_1_with_the_whole_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def first_fails(report: Report, _: object, served: models.Served, __: object) -> None:
        report.compare(served.name, "engine", lambda: 1 / 0 if served is models.MODELS[0] else GOOD, GOOD)

    monkeypatch.setattr(compare, "print_versions", lambda _: None)
    monkeypatch.setattr(compare, "compare_model", first_fails)
    monkeypatch.setattr(compare, "throughput", lambda *_: ["tokens a second"])
    monkeypatch.setattr("sys.argv", ["compare", "--vllm", "a", "--llama-cpp", "b", "--transformers4", "c"])
    with pytest.raises(SystemExit) as ended:
        compare.main()
    printed = capsys.readouterr().out
    assert ended.value.code == 1
    assert printed.count("good") >= len(models.MODELS) - 1 and "ZeroDivisionError" in printed
    assert printed.rstrip().endswith("tokens a second")


def test_a_program_that_fails_says_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with 2"):
        compare.call(["ls", tmp_path / "nothing"])
