"""examples/recipes: each is a run that `moe-lpr train` takes, and the shell launchers let variables override it."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from examples.train import data_flags, one_epoch, run_flags
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.launch import main as launch
from megatron_moe_lpr.training.configuration.config import TrainingConfig
from megatron_moe_lpr.training.configuration.config_file import config_values, parse_training_flags
from tests.launching.builders import LANGUAGES, ROOT, SIZES, fake_python, prepare_inputs, run_script

RECIPES = sorted((ROOT / "examples/recipes").glob("*.yaml"))
SCRIPTS = {"qwen1.5-1.8b": "qwen", "qwen2.5-7b": "qwen2.5_7b", "llama3-8b": "llama3_8b", "mistral-7b": "mistral_7b"}
EXPERTS = {name: 6 if name == "qwen1.5-1.8b" else 5 for name in SCRIPTS}
UNSET = dict.fromkeys(("DATA", *LANGUAGES, *SIZES), "")
"""Empty variables, which leave the recipe's values."""


def effective(words: list[str]) -> TrainingConfig:
    """Return the configuration that a shown command trains with."""
    return parse_training_flags(words[words.index("megatron_moe_lpr.pretrain") + 1 :])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Directory with empty files in place of those that the steps before a stage write."""
    directory = tmp_path_factory.mktemp("work")
    (directory / "dense").mkdir()
    (directory / "dense/config.json").touch()
    for path in RECIPES:
        values = yaml.safe_load(path.read_text())
        (directory / values["load"]).mkdir(parents=True)
        for prefix in (*values["data_path"], *values["valid_data_path"]):
            if isinstance(prefix, str):
                (directory / prefix).parent.mkdir(parents=True, exist_ok=True)
                (directory / f"{prefix}.idx").touch()
    fake_python(directory)
    return directory


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_whole_run_with_a_reason_for_each_group_of_settings(recipe):
    config = parse_training_flags(["--config", str(recipe)])
    stage = config.stage.stage
    assert recipe.stem.endswith(f"-{stage}" if stage == "sft" else f"-stage{stage}")
    assert config.batch.num_microbatches(config.layout.data_parallel_size(8)) >= 1
    lines = recipe.read_text().splitlines()
    for name in ("train_iters", "lr", "micro_batch_size", "global_batch_size", "expert_model_parallel_size", "bf16"):
        place = next(number for number, line in enumerate(lines) if line.startswith(f"{name}:"))
        block = [lines[place]]
        while lines[place - 1]:
            place -= 1
            block.append(lines[place])
        assert any("#" in line for line in block), name


@pytest.mark.parametrize("stage", ["1", "2"])
def test_recipes_of_the_7b_to_8b_models_differ_in_the_model_s_name_alone(stage):
    values = []
    for name in SCRIPTS:
        if EXPERTS[name] == 5:
            text = (ROOT / f"examples/recipes/{name}-stage{stage}.yaml").read_text()
            values.append(yaml.safe_load(text.replace(name, "NAME")))
    assert len(values) == 3 and values[0] == values[1] == values[2]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_model_s_steps_read_what_the_step_before_has_written(work, name):
    shown, script = {}, SCRIPTS[name]
    for step in ("convert", "stage1", "stage2"):
        settings = {"DRY_RUN": 1, "PYTHON": work / "python", **UNSET} | ({} if step == "stage1" else {"TRAIN_ITERS": 7})
        result = run_script(f"{step}_{script}.sh", work, "--seed", "3", **settings)
        assert result.returncode == 0, result.stderr
        shown[step] = shlex.split(result.stdout.splitlines()[-1])
        assert shown[step][-2:] == ["--seed", "3"]
    first, second = effective(shown["stage1"]), effective(shown["stage2"])
    save = shown["convert"][shown["convert"].index("--save") + 1]
    assert f"--num-experts {EXPERTS[name]} --top-k 2" in " ".join(shown["convert"])
    assert (str(first.checkpoint.load), first.checkpoint.save) == (save, second.checkpoint.load)
    assert first.batch.train_iters == 45776 and second.batch.train_iters == 7
    assert first.batch.seq_length == 1024 and second.batch.seq_length == 512
    assert first.data.data_path == [
        word for one in ("el", "hu", "tr") for word in ("1", f"datasets/{name}/train-{one}")
    ]
    assert second.data.data_path == [f"datasets/{name}/review-{one}" for one in ("en", "es", "zh", "el", "hu", "tr")]


def test_each_variable_overrides_the_recipe_and_flags_override_both(tmp_path):
    recipe = ROOT / "examples/recipes/llama3-8b-stage1.yaml"
    before = config_values(parse_training_flags(["--config", str(recipe)]))
    settings = {"LOAD": "a b", "SAVE": "s", "TRAIN_ITERS": "3", "SEQ_LENGTH": "32", "GLOBAL_BATCH": "8", "LR": "1e-3"}
    settings |= {"MICRO_BATCH": "2", "SAVE_INTERVAL": "4", "LOG_INTERVAL": "1", "TP": "2", "PP": "4", "EP": "1"}
    settings |= {"RECOMPUTE": "moe", "PLATFORM": "cpu", "FP8": "0"}
    after = config_values(parse_training_flags(run_flags(recipe, settings, ["--lr", "2e-3", "--seed", "5"])))
    changed = {name: value for name, value in after.items() if value != before[name]}
    assert changed == {
        "load": "a b",
        "save": "s",
        "train_iters": 3,
        "seq_length": 32,
        "global_batch_size": 8,
        "lr": 2e-3,
        "micro_batch_size": 2,
        "save_interval": 4,
        "log_interval": 1,
        "seed": 5,
        "platform": "cpu",
        "bf16": False,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 4,
        "expert_model_parallel_size": 1,
        "recompute_granularity": "selective",
        "recompute_modules": ["moe"],
    }
    assert config_values(parse_training_flags(run_flags(recipe, {}, []))) == before | {"platform": "cuda"}


def test_a_recipe_may_keep_documents_apart(tmp_path):
    recipe = tmp_path / "own.yaml"
    text = (ROOT / "examples/recipes/llama3-8b-stage1.yaml").read_text()
    recipe.write_text(text + "reset_attention_mask: true\nreset-position-ids: true\n")
    documents = parse_training_flags(run_flags(recipe, {}, [])).data.documents
    assert (documents.reset_attention_mask, documents.reset_position_ids) == (True, True)
    flags = ["--no-reset-position-ids"]
    assert not parse_training_flags(run_flags(recipe, {}, flags)).data.documents.reset_position_ids


def test_recompute_none_switches_off_what_a_recipe_has(tmp_path):
    recipe = tmp_path / "own.yaml"
    text = (ROOT / "examples/recipes/llama3-8b-stage1.yaml").read_text()
    recipe.write_text(text + "recompute_granularity: selective\nrecompute_modules: [moe, mlp]\n")
    config = parse_training_flags(run_flags(recipe, {"RECOMPUTE": "none"}, []))
    assert config.compute.recompute_granularity is None and config.compute.recompute_modules is None
    assert parse_training_flags(run_flags(recipe, {}, [])).compute.recompute_modules == ("moe", "mlp")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"DATA": "d"}, "--data-path 1 d/train-el 1 d/train-hu --valid-data-path d/valid-el d/valid-hu d/valid-en"),
        ({"EXPANDED": "cs"}, "--data-path 1 x/train-cs --valid-data-path x/valid-cs x/valid-en"),
        ({"ORIGINAL": "en\nzh"}, "--data-path 1 x/train-el 1 x/train-hu --valid-data-path x/valid-el x/valid-hu"),
        ({"stage": "2", "EXPANDED": "cs"}, "--data-path x/review-en x/review-cs --valid-data-path"),
    ],
)
def test_other_data_and_languages(changes, expected):
    values = {"data_path": [1, "x/train-el", 1, "x/train-hu"], "original_languages": ["en"]}
    values["valid_data_path"] = ["x/valid-el", "x/valid-en"]
    if changes.get("stage") == "2":
        values["data_path"] = ["x/review-en", "x/review-el"]
    assert " ".join(data_flags(values, changes)).startswith(expected)
    assert data_flags(values, {"DATA": "", "LOAD": "x"}) == []


@pytest.mark.parametrize(
    ("data_path", "words"),
    [
        (["x/corpus"], "x/corpus is not DIRECTORY/PART-LANGUAGE"),
        ([1, "x/train-el", 2, "x/train-hu"], "different weights"),
    ],
)
def test_a_recipe_whose_data_variables_cannot_change_says_so(data_path, words):
    with pytest.raises(UserError, match=words):
        data_flags({"data_path": data_path, "original_languages": ["en"]}, {"EXPANDED": "el"})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A converted tiny model and datasets."""
    return prepare_inputs(tmp_path_factory.mktemp("inputs"))


def test_a_new_recipe_needs_no_new_script(inputs, tmp_path):
    """A recipe outside of examples/, by its path, with the steps of one pass over its data."""
    values = yaml.safe_load((ROOT / "examples/recipes/qwen1.5-1.8b-stage2.yaml").read_text())
    data = inputs / "data"
    values |= {"load": str(inputs / "moe"), "save": str(tmp_path / "run"), "seq_length": 32, "global_batch_size": 8}
    values |= {"data_path": [f"{data}/review-el", f"{data}/review-en"], "valid_data_path": [f"{data}/valid-el"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    settings = {**UNSET, "TRAIN_ITERS": "epoch", "DRY_RUN": 1}
    result = run_script("train.sh", tmp_path, str(tmp_path / "mine.yaml"), "--micro-batch-size", "2", **settings)
    assert result.returncode == 0, result.stderr
    config = effective(shlex.split(result.stdout.splitlines()[-1]))
    tokens = sum(yaml.safe_load(Path(f"{prefix}.json").read_text())["tokens"] for prefix in values["data_path"])
    assert config.batch.train_iters == tokens // (8 * 32) == one_epoch(config)
    assert "Layouts for 1 x 80 GiB" in result.stdout and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "stage1"), [("qwen", "examples/stage1_qwen.sh"), ("llama3-8b", "examples/train.sh llama3-8b-stage1")]
)
def test_a_chain_of_jobs_takes_a_script_s_name_or_a_recipe_s(name, stage1, tmp_path):
    fake = tmp_path / "sbatch"
    fake.write_text('#!/usr/bin/env bash\necho "$@ SAVE=${SAVE:-} ITERS=${TRAIN_ITERS:-}" >>"$RECORD"; echo 5\n')
    fake.chmod(0o755)
    settings = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path / "record")}
    chain = ["bash", str(ROOT / "examples/slurm/submit_chain.sh")]
    subprocess.run([*chain, name], env=settings, check=True, timeout=60)
    first, second, last = (tmp_path / "record").read_text().splitlines()
    assert first.endswith(f"train.sbatch {stage1} SAVE=runs/{name}/stage1 ITERS=")
    assert second.endswith(f"{stage1.replace('stage1', 'stage2')} SAVE=runs/{name}/stage2 ITERS=epoch")
    assert "examples/export.sh" in last
    failed = subprocess.run([*chain, "none"], env=settings, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1 and failed.stderr.startswith("error: no examples/stage1_none.sh, nor ")


def test_the_launcher_checks_a_recipe_before_it_starts_ranks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megatron_moe_lpr.launch.ForwardedStop", lambda: None)
    (tmp_path / "bad.yaml").write_text(RECIPES[0].read_text() + "train_iter: 3\n")
    with pytest.raises(SystemExit):
        launch(["--nproc-per-node", "2", "train", "--config", os.fspath(tmp_path / "bad.yaml")])
    assert "--train-iter" in capsys.readouterr().err
