"""A run's flags as a file: written by every run, and given back."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import yaml

from megatron_moe_lpr.flag_marks import marked_flags
from megatron_moe_lpr.training.configuration.config import TrainingConfig
from megatron_moe_lpr.training.configuration.config_file import (
    config_values,
    parse_training_flags,
    read_config_file,
    training_config,
    versions,
)
from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, make_data, metrics, train

WORDS = ["--stage", "1", "--load", "a b", "--save", "s", "--train-iters", "7", "--data-path", "0.5", "x", "0.5", "y"]
WORDS += ["--original-languages", "en", "zh", "--lr", "3e-4", "--no-async-save", "--recompute-modules", "moe", "mlp"]


def write(path: Path, values: object) -> Path:
    path.write_text(json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("name", ["run.json", "run.yaml"])
def test_every_flag_comes_back(name, tmp_path):
    config = parse_training_flags(WORDS)
    file = write(tmp_path / name, config_values(config))
    again = parse_training_flags(["--config", str(file)])
    assert again == config
    assert parse_training_flags([f"--config={file}"]) == config


def test_every_field_of_every_dataclass_is_there_under_a_name_of_its_own():
    config = parse_training_flags(WORDS)
    fields = [flag.name for flag in marked_flags(TrainingConfig)]
    assert len(fields) == len(set(fields)) and set(fields) - {"config"} == set(config_values(config))


def test_flags_override_the_file_wherever_they_stand(tmp_path):
    file = write(tmp_path / "c.yaml", {"stage": 1, "load": "a", "save": "s", "train-iters": 7, "lr": "1e-3"})
    more = ["--data-path", "x", "--lr", "2e-3", "--original-languages", "en"]
    for words in (["--config", str(file), *more], [*more, "--config", str(file)]):
        config = parse_training_flags(words)
        assert (config.optimizer.lr, config.batch.train_iters, config.data.data_path) == (2e-3, 7, ["x"])


@pytest.mark.parametrize("stage", [("--stage", "sft"), ("--stage=sft",), ("--stage", "1", "--stage", "sft")])
def test_fine_tuning_has_a_learning_rate_of_its_own_unless_one_is_given(stage, tmp_path):
    rest = [*WORDS[2:-6], "--original-languages", "en"]
    found = parse_training_flags([*stage, *rest]).optimizer
    assert (found.lr, found.lr_decay_style) == (2e-5, "linear")
    file = write(tmp_path / "c.yaml", {"stage": "sft", "lr_decay_style": "WSD"})
    for words in (["--config", str(file)], [*stage, "--lr-decay-style", "WSD"]):
        found = parse_training_flags([*words, *rest, "--lr=1e-3"]).optimizer
        assert (found.lr, found.lr_decay_style) == (1e-3, "WSD")
    values = config_values(parse_training_flags([*stage, *rest]))
    assert training_config(values).optimizer.lr == training_config({**values, "lr": None}).optimizer.lr == 2e-5


def test_the_other_stages_have_the_paper_s_learning_rate():
    for name in ("1", "2", "full", "blocks"):
        found = parse_training_flags(["--stage", name, *WORDS[2:-6], "--original-languages", "en"]).optimizer
        assert (found.lr, found.lr_decay_style) == (5e-5, "cosine")


def test_a_file_that_a_run_wrote_holds_more_than_flags(tmp_path):
    values = config_values(parse_training_flags(WORDS))
    file = write(tmp_path / "config.json", {"config": values, "versions": versions(), "world_size": 2})
    assert read_config_file(file) == values
    assert {"python", "torch", "megatron-core", "megatron-moe-lpr"} <= set(versions())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "one mapping from flags to values is expected"),
        ("a: [b\n", "cannot be read"),
        ("1: 2\n", "one mapping"),
        ("original_languages: [en, no]\n", "original_languages holds a truth value; put quotes"),
        ("data_path: {x: 1}\n", "data_path holds a dict"),
    ],
)
def test_what_is_no_such_file_is_named(text, message, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as stop:
        parse_training_flags(["--config", str(file)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and f"--config {file}: " in error and message in error


def test_unknown_keys_and_missing_files_are_one_line(tmp_path, capsys):
    file = write(tmp_path / "c.yaml", {"train_itres": 7})
    with pytest.raises(SystemExit) as stop:
        parse_training_flags([*WORDS, "--config", str(file)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--train-itres" in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        parse_training_flags(["--config", str(tmp_path / "none.yaml")])
    assert "none.yaml: no such file" in capsys.readouterr().err


def test_help_names_the_flag(capsys):
    with pytest.raises(SystemExit):
        parse_training_flags(["--help"])
    assert "--config" in capsys.readouterr().out
    assert {field.name for field in dataclasses.fields(TrainingConfig)} >= {"config", "stage"}


def train_by_flags(*words: str) -> bool:
    """On every rank: what `moe-lpr train WORDS` does."""
    from megatron_moe_lpr.pretrain import pretrain

    return pretrain(parse_training_flags(words))


def test_a_run_writes_its_config_and_started_by_it_gives_the_same_losses_to_the_bit(tmp_path):
    load, data = make_checkpoint(tmp_path), make_data(tmp_path)
    first, second = tmp_path / "first", tmp_path / "second"
    changes = {"expert_model_parallel_size": 2, "seed": 77, "tensorboard_dir": tmp_path / "tb"}
    rank_pool(2).run(partial(train, load, first, data, **changes))
    record = json.loads((first / "config.json").read_text())
    assert (record["world_size"], record["data_parallel_size"]) == (2, 2)
    assert record["config"]["seed"] == 77 and record["config"]["expert_model_parallel_size"] == 2
    assert record["versions"] == versions() and record["command_line"]
    events = b"".join(file.read_bytes() for file in (tmp_path / "tb").iterdir())
    assert b"| expert_model_parallel_size | 2 |" in events and b"| load_balancing_coeff | 0.01 |" in events
    words = ("--config", str(first / "config.json"), "--save", str(second))
    assert all(rank_pool(2).run(train_by_flags, *words))
    losses = [{step: line["lm_loss"] for step, line in metrics(save).items()} for save in (first, second)]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    assert json.loads((second / "config.json").read_text())["config"] == record["config"] | {"save": str(second)}
