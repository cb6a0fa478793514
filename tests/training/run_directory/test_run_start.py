"""What a run began from is said by its own checkpoints, not by what --load names when it is resumed."""

import functools
import json
import shutil

import pytest

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard
from megatron_moe_lpr.checkpoint.format.directory import LATEST_FILE, resolve_checkpoint, write_latest
from megatron_moe_lpr.training.run_directory.run_start import card_at_start, opened, opening_steps
from tests.conversion.helpers import assert_same_tensors, checkpoint_tensors
from tests.distributed import rank_pool
from tests.training.outcomes import train_outcome
from tests.training.runs import make_checkpoint, make_data, metrics, rewind
from tests.training.test_damage import flip

ONLY = {"save_trainable_only": True}


def go(load, save, data, stage="1", **changes) -> str | None:
    outcomes = rank_pool(2).run(functools.partial(train_outcome, load, save, data, stage, **changes))
    assert outcomes[0] == outcomes[1]
    return outcomes[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Stage 1, with checkpoints of steps 3 and 6, and from its step 3 a review, saved whole and as what trains."""
    root = tmp_path_factory.mktemp("run_start")
    load, data = make_checkpoint(root), make_data(root)
    assert go(load, root / "1", data, save_interval=3) is None
    write_latest(root / "1", 3)
    for name, extra in (("whole", {}), ("only", ONLY)):
        assert go(root / "1", root / name, data, "2", save_interval=3, **extra) is None
    write_latest(root / "1", 6)
    return root, load, data


def history(save) -> list[tuple[str, int]]:
    card = resolve_checkpoint(save).card()
    return [(entry["stage"], entry["iterations"]) for entry in card.history]


@pytest.mark.parametrize("name, extra", [("whole", {}), ("only", ONLY)])
@pytest.mark.parametrize("habit", [True, False])
def test_a_resumed_review_is_what_it_was(name, extra, habit, runs, tmp_path):
    """With Megatron's habit, `--load SAVE --save SAVE`, and with stage 1 having gone on: to the bit the same run."""
    root, _, data = runs
    save = rewind(root / name, tmp_path / "run", 3)
    assert go(save if habit else root / "1", save, data, "2", **extra) is None
    assert history(save) == history(root / name) == [("1", 3), ("2", 6)]
    assert_same_tensors(checkpoint_tensors(save), checkpoint_tensors(root / name))
    found, expected = metrics(save), metrics(root / name)
    assert all(found[step]["lm_loss"] == expected[step]["lm_loss"] for step in (4, 5, 6))
    recorded = resolve_checkpoint(save).card().base
    assert recorded == resolve_checkpoint(root / name).card().base


def test_a_run_may_load_itself_again_and_again(runs, tmp_path):
    root, _, data = runs
    save = rewind(root / "1", tmp_path / "run", 3)
    assert go(save, save, data) is None
    assert go(save, save, data, train_iters=8, accept_changes=("train-iters",)) is None
    assert history(save) == [("1", 8)]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "moe_lpr/card.json", "moe_lpr/config.json"])
def test_a_run_that_loads_itself_falls_back(name, runs, tmp_path):
    root, _, data = runs
    save = shutil.copytree(root / "1", tmp_path / "run")
    flip(save / "iter_0000006" / name)
    assert go(save, save, data) is None
    assert (save / "damaged-iter_0000006").is_dir() and history(save) == [("1", 6)]
    assert_same_tensors(checkpoint_tensors(save), checkpoint_tensors(root / "1"))


def test_a_run_that_loads_itself_after_a_kill_in_its_first_save(runs, tmp_path):
    root, _, data = runs
    save = rewind(root / "1", tmp_path / "run", 3)
    (save / LATEST_FILE).unlink()
    assert go(save, save, data) is None
    assert_same_tensors(checkpoint_tensors(save), checkpoint_tensors(root / "1"))


def test_a_base_that_is_gone_is_named_with_a_way_out(runs, tmp_path):
    root, _, data = runs
    save = rewind(root / "only", tmp_path / "run", 3)
    card_file = resolve_checkpoint(save).side_directory / "card.json"
    card = json.loads(card_file.read_text())
    card["base"]["path"] = str(tmp_path / "gone")
    card_file.write_text(json.dumps(card))
    (card_file.parent / "checksums.json").unlink()
    before = sorted(save.rglob("*"))
    error = go(root / "1", save, data, "2", **ONLY)
    assert "gone" in error and "give --load the one it began from" in error
    assert [path for path in sorted(save.rglob("*")) if path.name != ".started"] == before
    # The advice is one that is followed.
    assert go(root / "1" / "iter_0000003", save, data, "2", **ONLY) is None
    assert history(save) == [("1", 3), ("2", 6)]


def card(openness: float, **entry) -> CheckpointCard:
    history = [{"stage": "1", "iterations": 100, "train_iters": 100}, {"stage": "1", "train_iters": 200, **entry}]
    return CheckpointCard("qwen2", [5], 2, "float32", "", history=history, expansions=[[2], [2]], openness=openness)


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("done", [1, 7, 19])
@pytest.mark.parametrize("length", [None, 30])
def test_how_far_experts_were_open(start, done, length):
    """To the bit, or the resumed run would be another: 20 steps of 200, or 30 as the flag says."""
    steps = opening_steps(length, [200])
    assert steps == (length or 20)
    own = card(opened(start, done, steps), iterations=done, open_experts_iters=length)
    before = card_at_start(own)
    assert before.openness == start and before.history == own.history[:-1]


def test_openness_between():
    """Of a start that was half open; what --load names now, opened further, does not count."""
    own = card(opened(0.5, 10, 20), iterations=10, open_experts_iters=None)
    assert own.openness == 0.75
    assert card_at_start(own).openness == pytest.approx(0.5, abs=1e-15)
    assert card_at_start(own, card(0.9, iterations=0)).openness == pytest.approx(0.5, abs=1e-15)
    assert card_at_start(own, card(0.5, iterations=0)).openness == 0.5


def test_experts_that_are_open_by_now():
    assert card_at_start(card(1.0, iterations=60, open_experts_iters=50)).openness < 1
    assert card_at_start(card(1.0, iterations=60, open_experts_iters=None)).openness == 1


def test_a_damaged_base_does_not_condemn_what_builds_on_it(runs, tmp_path):
    root, _, data = runs
    save = shutil.copytree(root / "only", tmp_path / "run")
    base = shutil.copytree(root / "1" / "iter_0000003", tmp_path / "base" / "iter_0000003")
    flip(base / "__0_0.distcp")
    before = {path: path.read_bytes() for path in save.rglob("*") if path.is_file() and path.name[0] != "."}
    error = go(base, save, data, "2", **ONLY)
    assert f"{base / '__0_0.distcp'}: damaged" in error
    assert {path: path.read_bytes() for path in save.rglob("*") if path.is_file() and path.name[0] != "."} == before
