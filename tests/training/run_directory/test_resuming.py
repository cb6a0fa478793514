"""What a run is, is part of its checkpoint: differences are refused by name, or taken from a step on."""

import functools
import json
import shutil

import pytest

from tests.distributed import rank_pool
from tests.training.outcomes import train_outcome
from tests.training.runs import make_checkpoint, make_data, metrics, rewind


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    root = tmp_path_factory.mktemp("resuming")
    load, data = make_checkpoint(root), make_data(root)
    assert go(load, root / "run", data, save_interval=3) is None
    return root, load, data


def go(load, save, data, **changes) -> str | None:
    outcomes = rank_pool(2).run(functools.partial(train_outcome, load, save, data, **changes))
    assert outcomes[0] == outcomes[1]
    return outcomes[0]


def history(save, iteration) -> dict:
    return json.loads((save / f"iter_{iteration:07d}" / "moe_lpr" / "card.json").read_text())["history"][-1]


DIFFERENCES = {
    "lr": ({"lr": 1e-3}, "lr 0.01 there and 0.001 here"),
    "weight-decay": ({"weight_decay": 0.1}, "weight_decay 0.0 there and 0.1 here"),
    "adam-beta2": ({"adam_beta2": 0.9}, "adam_beta2"),
    "load-balancing-coeff": ({"load_balancing_coeff": 0.1}, "load_balancing_coeff 0.01 there and 0.1 here"),
    "train-iters": ({"train_iters": 8}, "train_iters 6 there and 8 here"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences_are_named(name, setting, tmp_path):
    root, load, data = setting
    changes, words = DIFFERENCES[name]
    error = go(load, rewind(root / "run", tmp_path / "run", 3), data, **changes)
    assert words in error and f"--accept-changes {name}" in error
    assert not (tmp_path / "run" / "iter_0000006").exists()


def test_other_data_and_weights_are_named(setting, tmp_path):
    root, load, data = setting
    save = rewind(root / "run", tmp_path / "run", 3)
    weighted = {"data_path": ["1", data["el"], "3", data["hu"]]}
    assert "el 0.25 documents" in go(load, save, data, **weighted)
    other = make_data_again(tmp_path, data)
    assert "data [" in go(load, save, other)
    assert go(load, save, other, accept_changes=("data",)) is None
    assert [sorted(change) for change in history(save, 6)["changes"]] == [["data", "step"]]


def make_data_again(root, data) -> dict[str, str]:
    """The same languages and lengths with one other token."""
    from tests.data.builders import write_dataset

    documents = [[int((first + step) % 30) + 1 for step in range(80)] for first in range(60)]
    return data | {"el": write_dataset(root / "el", "el", documents)}


def test_precision_and_unknown_names_are_refused(setting, tmp_path):
    root, load, data = setting
    save = rewind(root / "run", tmp_path / "run", 3)
    error = go(load, save, data, fp32=False, bf16=True)
    assert "dtype 'float32' there and 'bfloat16' here" in error and "another run" in error
    assert "--accept-changes seed: can't change" in go(load, save, data, accept_changes=("seed",))


def test_validation_data_and_originals_without_data_may_change(setting, tmp_path):
    """What the original languages are does not depend on the validation data that happen to be there."""
    root, load, data = setting
    save = rewind(root / "run", tmp_path / "run", 3)
    more = {"valid_data_path": [data["en"]], "original_languages": ["English,es", "zh_CN"], "save_interval": 1}
    assert go(load, save, data, train_iters=6, **more) is None
    assert history(save, 4)["original_languages"] == ["en", "es", "zh-CN"]
    assert go(load, rewind(save, tmp_path / "again", 5), data) is None
    assert metrics(tmp_path / "again")[6]["lm_loss"] == metrics(root / "run")[6]["lm_loss"]


def test_originals_are_known_where_the_flag_is_not_given_again(setting, tmp_path, capfd):
    """The run's own checkpoint names them: for its validation, and for stage 2 and evaluation after it."""
    root, load, data = setting
    save = rewind(root / "run", tmp_path / "run", 3)
    changes = {"original_languages": [], "valid_data_path": [data["en"]], "save_interval": 3}
    assert go(load, save, data, **changes) is None
    assert history(save, 6)["original_languages"] == ["en"]
    assert "every language counts as expanded" not in capfd.readouterr().out


def test_an_accepted_change_counts_from_its_step(setting, tmp_path):
    root, load, data = setting
    save = rewind(root / "run", tmp_path / "run", 3)
    assert go(load, save, data, lr=1e-3, override_opt_param_scheduler=True) is None
    before, after = metrics(root / "run"), metrics(save)
    for step in (4, 5):
        assert after[step]["lr"] == pytest.approx(before[step]["lr"] / 10, rel=1e-9)
    assert after[4]["lm_loss"] == before[4]["lm_loss"] and after[5]["lm_loss"] != before[5]["lm_loss"]
    entry = history(save, 6)
    assert entry["lr"] == 1e-3 and entry["changes"] == [{"step": 3, "lr": [0.01, 0.001]}]


def test_the_checkpoints_schedule_may_be_kept(setting, tmp_path):
    root, load, data = setting
    save = rewind(root / "run", tmp_path / "run", 3)
    assert go(load, save, data, lr=1e-3, use_checkpoint_opt_param_scheduler=True) is None
    before, after = metrics(root / "run"), metrics(save)
    assert all(after[step][name] == before[step][name] for step in (4, 5, 6) for name in ("lr", "lm_loss"))
    assert history(save, 6)["lr"] == 0.01 and "changes" not in history(save, 6)


def test_a_lengthened_run_keeps_its_data_in_order(setting, tmp_path):
    """With a constant rate nothing but the data's order could make the steps up to the old end differ."""
    _, load, data = setting
    constant = {"lr_decay_style": "constant", "save_interval": 3}
    assert go(load, tmp_path / "short", data, **constant) is None
    save = rewind(tmp_path / "short", tmp_path / "long", 3)
    longer = constant | {"train_iters": 9}
    assert go(load, save, data, **longer, accept_changes=("train-iters",)) is None
    before, after = metrics(tmp_path / "short"), metrics(save)
    assert sorted(after) == [4, 5, 6, 7, 8, 9]
    assert all(after[step]["lm_loss"] == before[step]["lm_loss"] for step in (4, 5, 6))
    assert history(save, 9)["train_lengths"] == [6, 9]
    # The card knows the length from now on: going on needs no flag, and gives the same steps.
    again = rewind(save, tmp_path / "again", 6)
    assert go(load, again, data, **longer) is None
    assert all(metrics(again)[step]["lm_loss"] == after[step]["lm_loss"] for step in (7, 8, 9))
    assert "lengthened, not shortened" in go(load, again, data, **constant, accept_changes=("train-iters",))


def test_checkpoints_without_a_latest_file_are_not_overwritten(setting, tmp_path):
    root, load, data = setting
    save = tmp_path / "run"
    shutil.copytree(root / "run", save)
    latest = save / "latest_checkpointed_iteration.txt"
    for content in (None, "", "soon"):
        latest.unlink(missing_ok=True)
        if content is not None:
            latest.write_text(content)
        error = go(load, save, data)
        assert "newest complete checkpoint is iter_0000006" in error and f"echo 6 > '{latest}'" in error
    shutil.rmtree(save / "iter_0000006")
    (save / "iter_0000006").mkdir()
    assert "newest complete checkpoint is iter_0000003" in go(load, save, data)


def test_the_checkpoints_schedule_is_not_stretched_in_a_lengthened_run(setting, tmp_path):
    root, load, data = setting
    save = rewind(root / "run", tmp_path / "run", 3)
    changes = {"accept_changes": ("train-iters",), "use_checkpoint_opt_param_scheduler": True}
    assert go(load, save, data, train_iters=8, save_interval=7, **changes) is None
    short, longer = metrics(root / "run"), metrics(save)
    for step in (4, 5, 6):
        assert longer[step]["lr"] == short[step]["lr"]
    assert longer[7]["lr"] == longer[8]["lr"] == 0.0
    assert history(save, 8)["lr_decay_iters"] == 6
    # The same command line, as a batch system starts it again.
    assert go(load, rewind(save, tmp_path / "again", 7), data, train_iters=8, **changes) is None
    assert metrics(tmp_path / "again")[8]["lm_loss"] == longer[8]["lm_loss"]
