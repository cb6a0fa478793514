"""Means and table from results files of lm_eval."""

import io
import json
import os

import pytest
from rich.console import Console

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.lm_eval.scores import benchmark_record, read_scores
from megatron_moe_lpr.evaluation.lm_eval.tables import benchmarks_table
from megatron_moe_lpr.evaluation.lm_eval.tasks import choose_tasks

KNOWN = {"m_mmlu_en", "m_mmlu_hu", "global_mmlu_full_el", "spanish_bench_flores_en-es"}
MMLU, FLORES = choose_tasks(["mmlu", "flores"], ["en", "es", "hu", "el"], KNOWN)


def write_results(directory, scores, metric="acc", name="results_2026-01-01.json"):
    """Write a results file of lm_eval 0.4.13, as far as it is read."""
    found = {
        task: {"alias": task, f"{metric},none": value, f"{metric}_stderr,none": 0.1} for task, value in scores.items()
    }
    (directory / "model").mkdir(parents=True, exist_ok=True)
    path = directory / "model" / name
    path.write_text(json.dumps({"results": found, "n-shot": {}}))
    return path


def test_the_newest_results_count(tmp_path):
    old = write_results(
        tmp_path, {"m_mmlu_en": 0.1, "m_mmlu_hu": 0.1, "global_mmlu_full_el": 0.1}, name="results_9.json"
    )
    os.utime(old, (1, 1))
    write_results(tmp_path, {"m_mmlu_en": 0.5, "m_mmlu_hu": 0.25, "global_mmlu_full_el": 0.75})
    scores = read_scores(tmp_path, MMLU)
    assert {language: score["value"] for language, score in scores.items()} == {"en": 0.5, "hu": 0.25, "el": 0.75}
    assert scores["el"]["stderr"] == 0.1


@pytest.mark.parametrize(
    ("scores", "metric", "message"),
    [
        ({"m_mmlu_en": 0.5}, "acc", "not the results of m_mmlu_en, m_mmlu_hu"),
        ({task: float("nan") for task in KNOWN}, "acc", "acc is nan"),
        (dict.fromkeys(KNOWN, 0.5), "f1", "not the results of"),
    ],
)
def test_results_of_something_else_are_refused(tmp_path, scores, metric, message):
    write_results(tmp_path, scores, metric)
    with pytest.raises(UserError, match=message):
        read_scores(tmp_path, MMLU)


def test_an_answer_found_by_a_filter_counts(tmp_path):
    """Of several filters the benchmark's first, which not every task has."""
    (mgsm,) = choose_tasks(["mgsm"], ["de", "eu"], {"mgsm_native_cot_de", "mgsm_native_cot_eu"})
    path = write_results(tmp_path, {})
    both = {"exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.4, "exact_match,get-answer": 0.9}
    errors = {"exact_match_stderr,flexible-extract": 0.2}
    basque = {"exact_match,get-answer": 0.3, "exact_match_stderr,get-answer": 0.1}
    path.write_text(json.dumps({"results": {"mgsm_native_cot_de": both | errors, "mgsm_native_cot_eu": basque}}))
    scores = read_scores(tmp_path, mgsm)
    assert scores == {"de": {"value": 0.4, "stderr": 0.2}, "eu": {"value": 0.3, "stderr": 0.1}}
    record = benchmark_record(mgsm, ["de"], 8, {"base": scores, "final": scores})
    assert record["chance"] is None
    output = io.StringIO()
    Console(file=output, width=160).print(benchmarks_table({"benchmarks": [record]}))
    assert "40.00" in output.getvalue()


def test_no_results(tmp_path):
    with pytest.raises(UserError, match="no results_"):
        read_scores(tmp_path, MMLU)


def test_means_and_table():
    """Means leave out languages without a task; a translation between two original languages is original."""
    base = {language: {"value": value, "stderr": None} for language, value in (("en", 0.5), ("hu", 0.25), ("el", 0.5))}
    final = {
        language: {"value": value, "stderr": None} for language, value in (("en", 0.375), ("hu", 0.5), ("el", 0.5))
    }
    mmlu = benchmark_record(MMLU, ["en", "es"], 5, {"base": base, "final": final})
    assert mmlu["absent"] == ["es"]
    assert mmlu["means"]["original"] == {"languages": ["en"], "base": 0.5, "final": 0.375, "difference": -0.125}
    assert mmlu["means"]["expanded"] == {"languages": ["hu", "el"], "base": 0.375, "final": 0.5, "difference": 0.125}

    pair = {"en to es": {"value": 21.5, "stderr": None}}
    flores = benchmark_record(FLORES, ["en", "es"], 8, {"base": pair, "final": pair})
    assert flores["means"]["original"]["base"] == 21.5 and flores["means"]["expanded"] is None
    assert benchmark_record(FLORES, ["en"], 8, {"base": pair, "final": pair})["means"]["original"] is None

    output = io.StringIO()
    Console(file=output, width=160).print(benchmarks_table({"benchmarks": [mmlu, flores]}))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.getvalue().splitlines() if "│" in line]
    assert rows == [
        ["MMLU", "5", "acc", "original: en", "25.00", "50.00", "37.50", "-12.50"],
        ["MMLU", "5", "acc", "expanded: hu el", "25.00", "37.50", "50.00", "+12.50"],
        ["Flores", "8", "bleu", "original: en to es", "-", "21.50", "21.50", "+0.00"],
        ["Flores", "8", "bleu", "expanded: none", "-", "-", "-", "-"],
    ]
