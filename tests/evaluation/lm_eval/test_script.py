"""examples/evaluate.sh with the installed lm_eval, on tiny local data sets, on the CPU."""

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest

from tests.conversion.helpers import change_config
from tests.evaluation.lm_eval.local_sets import QUESTIONS, write_further_sets, write_local_sets
from tests.launching.builders import run_script, save_dense_model

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval: make test-eval")
OFFLINE = {"HF_HUB_OFFLINE": 1, "HF_DATASETS_OFFLINE": 1, "TOKENIZERS_PARALLELISM": "false"}
MODELS = ("base", "final")
TASKS = {
    "arc": {"en": "arc_challenge", "hu": "arc_hu", "el": "arc_challenge_mt_el"},
    "hellaswag": {"en": "hellaswag", "hu": "hellaswag_hu"},
    "mmlu": {"en": "m_mmlu_en", "hu": "m_mmlu_hu", "el": "global_mmlu_full_el"},
    "belebele": {"en": "belebele_eng_Latn", "hu": "belebele_hun_Latn", "el": "belebele_ell_Grek"},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Directory with a dense model, another model as the export, and the data sets."""
    work = tmp_path_factory.mktemp("benchmarks")
    save_dense_model(work / "dense")
    shutil.copytree(work / "dense", work / "export")
    _flip_weights(work / "export" / "model.safetensors")
    if importlib.util.find_spec("lm_eval") is not None:
        write_local_sets(work)
    return work


def _flip_weights(path: Path) -> None:
    """Make another model of it, with other answers."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    save_file({name: tensor.flip(0) if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}, path)


def evaluate(work: Path, *arguments: str, **settings: object):
    """Run the script."""
    cache = {**OFFLINE, "HF_HOME": work / "cache", "HF_DATASETS_CACHE": work / "cache"}
    names = {"ORIGINAL": "en", "EXPANDED": "hu el", "HF_OUT": work / "export", "OUT": work / "out", "BATCH_SIZE": 8}
    benchmarks = {"BENCHMARKS": " ".join(TASKS), "timeout": 1200}
    return run_script("evaluate.sh", work, *arguments, **{**cache, **names, **benchmarks, **settings})


@needs_harness
def test_table_and_record(work):
    """Scores equal those in lm_eval's files, means are computed by hand; a second start repeats no run."""
    done = evaluate(work, "--num-fewshot", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "HellaSwag: lm_eval has no task for el; left out there" in done.stdout
    record = json.loads((work / "out" / "benchmarks.json").read_text())
    places = {(name, model): work / "out" / model / name for name in TASKS for model in MODELS}
    found = {key: results(place) for key, place in places.items()}
    assert [one["name"] for one in record["benchmarks"]] == [*TASKS]
    for one in record["benchmarks"]:
        assert {key: what["task"] for key, what in one["languages"].items()} == TASKS[one["name"]]
        metric = "acc_norm,none" if one["name"] in ("arc", "hellaswag") else "acc,none"
        for model in MODELS:
            scores = {key: found[one["name"], model][task][metric] for key, task in TASKS[one["name"]].items()}
            assert scores == {key: what[model]["value"] for key, what in one["languages"].items()}
            expanded = [scores[language] for language in ("hu", "el") if language in scores]
            assert one["means"]["original"][model] == scores["en"]
            assert math.isclose(one["means"]["expanded"][model], sum(expanded) / len(expanded))
            assert f"{one['means']['expanded'][model] * 100:.2f}" in done.stdout
    assert any(found[name, "base"] != found[name, "final"] for name in TASKS)
    assert "expanded: hu el" in done.stdout

    again = evaluate(work, "--num-fewshot", "1")
    assert again.returncode == 0 and again.stdout.count("already there") == 8
    assert json.loads((work / "out" / "benchmarks.json").read_text()) == record


@needs_harness
def test_further_benchmarks_through_the_chat_template(work, tmp_path):
    """A model whose settings end at its template's token: lm_eval renders the questions by it."""
    write_further_sets(tmp_path)
    model = tmp_path / "chat"
    shutil.copytree(work / "dense", model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}<assistant>"
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    (model / "generation_config.json").write_text('{"eos_token_id": 0}')
    change_config(model, max_position_embeddings=1024)  # lm_eval keeps 256 of them for an answer
    places = {"HF": model, "HF_OUT": model, "OUT": tmp_path / "out", "ORIGINAL": "de", "EXPANDED": "el", "LIMIT": 1}
    done = evaluate(tmp_path, "--num-fewshot", "2", BENCHMARKS="include mgsm", **places)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "questions go through the models' chat template" in done.stdout
    record = json.loads((tmp_path / "out" / "benchmarks.json").read_text())
    assert record["chat_template"] and [one["shots"] for one in record["benchmarks"]] == [0, 2]
    include, mgsm = ({name: what["task"] for name, what in one["languages"].items()} for one in record["benchmarks"])
    assert include == {"de": "include_base_44_german", "el": "include_base_44_greek"}
    assert mgsm == {"de": "mgsm_native_cot_de"}
    for name in ("include", "mgsm"):
        (path,) = (tmp_path / "out" / "final" / name).rglob("results_*.json")
        written = json.loads(path.read_text())
        assert (written["chat_template"], written["fewshot_as_multiturn"]) == (template, True)


def results(directory: Path) -> dict:
    """Read the results of a run of lm_eval over all questions of its tasks."""
    (path,) = directory.rglob("results_*.json")
    found = json.loads(path.read_text())
    counts = {number["effective"] for number in found["n-samples"].values()}
    assert QUESTIONS in counts and counts <= {QUESTIONS, 1}  # Global-MMLU has one of each subject here
    return found["results"]


@needs_harness
def test_a_failed_benchmark_is_told_and_nothing_is_taken_for_it(work, tmp_path):
    """A data set is missing: lm_eval's error, then one line, and no results, so that the next start runs it again."""
    done = evaluate(work, BENCHMARKS="mmlu", ORIGINAL="de", OUT=tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: lm_eval ended with code 1 on m_mmlu_de,")
    assert not list((tmp_path / "out").rglob("*.json"))


@needs_harness
def test_dry_run_starts_nothing(work, tmp_path):
    settings = {"BENCHMARKS": "arc mmlu belebele", "LAUNCHER": "accelerate launch -m lm_eval", "LIMIT": 3}
    done = evaluate(work, DRY_RUN=1, OUT=tmp_path / "out", **settings)
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if line.startswith("accelerate launch -m lm_eval --model hf")]
    assert len(commands) == 6 and all("--limit 3" in line and "--device cpu" in line for line in commands)
    assert "--tasks arc_challenge,arc_hu,arc_challenge_mt_el --num_fewshot 25" in commands[0]
    assert "m_mmlu_en,m_mmlu_hu,global_mmlu_full_el --num_fewshot 5" in commands[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"HF_OUT": "none"}, "HF_OUT: none/config.json does not exist; export.sh writes it"),
        ({"HF": "none"}, "HF: none/config.json does not exist"),
        ({"EXPANDED": " "}, "name languages"),
    ],
)
def test_mistakes(work, tmp_path, settings, message):
    done = evaluate(work, OUT=tmp_path / "out", **settings)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1 and message in errors[0], done.stderr
    assert not (tmp_path / "out").exists()
