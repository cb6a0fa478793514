"""Every command locks a checkpoint before it reads anything of it: no run removes one between a plan and a read."""

import dataclasses
import fcntl
import functools
import json
from pathlib import Path
from unittest import mock

import pytest

from megatron_moe_lpr.allocation.dense_source import open_dense_source
from megatron_moe_lpr.checkpoint.format import directory
from megatron_moe_lpr.checkpoint.format.card import read_card
from megatron_moe_lpr.checkpoint.format.directory import finish_iteration, resolve_checkpoint, write_latest
from megatron_moe_lpr.checkpoint.format.retention import RemovedCheckpoint, hide
from megatron_moe_lpr.checkpoint.format.trainable_only import kept_for_reading, record_base
from megatron_moe_lpr.conversion.expand import ExpandOptions, expand
from megatron_moe_lpr.conversion.verification.frozen import fingerprint_of_checkpoint
from megatron_moe_lpr.files.checksums import write_manifest
from tests.checkpoint.format.test_directory import CARD, make_iteration
from tests.conversion.helpers import run
from tests.distributed import rank_pool
from tests.training.outcomes import evaluation_outcome, train_outcome
from tests.training.runs import make_checkpoint, make_data
from tests.training.test_second_expansion import FIRST, change_card


def iteration(root: Path, number: int, **changes) -> Path:
    path = make_iteration(root / "partial")
    (path / "moe_lpr").mkdir()
    dataclasses.replace(CARD, **changes).write(path / "moe_lpr" / "card.json")
    write_manifest(path, {})
    return finish_iteration(path, root, number)


def is_locked(path: Path) -> bool:
    try:
        hide(path)
    except BlockingIOError:
        return True
    return False


def unlocked_cards(command, *arguments) -> list[str]:
    """Cards that a command read of a checkpoint that a run could have removed at that moment."""
    found = []

    def read(path: Path):
        with open(path.parents[1] / "metadata.json", "rb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append(str(path))
            except BlockingIOError:
                pass
        return read_card(path)

    with mock.patch.object(directory, "read_card", read):
        command(*arguments)
    return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("kept")
    load = make_checkpoint(root, model="qwen3")
    change_card(load, history=[FIRST])
    return load, make_data(root)


COMMANDS = {
    "export": lambda load, out: run("export", "--load", load, "--hf", out),
    "verify": lambda load, out: run("verify", "--load", load, "--hf", load.parent / "hf", "--platform", "cpu"),
    "inspect": lambda load, out: run("inspect", load, "--verify"),
    "fingerprint": lambda load, out: fingerprint_of_checkpoint(load),
    "dense source": lambda load, out: open_dense_source(load).layer(0),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_lock_before_they_read(name, inputs, tmp_path):
    def command() -> None:
        try:
            COMMANDS[name](inputs[0], tmp_path / "out")
        except SystemExit:
            assert name == "verify"  # its experts differ from the dense model's

    assert unlocked_cards(command) == []


def test_expand_locks_before_it_writes(inputs, tmp_path):
    """Its flag --add-experts is read from a card before, of which nothing else depends."""
    options = ExpandOptions(inputs[0], [1] * 4)
    assert unlocked_cards(expand, options, tmp_path / "out") == []


def test_ranks_lock_before_they_read(inputs, tmp_path):
    load, data = inputs
    assert rank_pool(2).run(unlocked_cards, evaluation_outcome, load, data) == [[], []]
    train = functools.partial(train_outcome, load, tmp_path / "run", data, train_iters=1)
    assert rank_pool(2).run(unlocked_cards, train) == [[], []]


def test_the_next_latest_is_taken_where_the_first_was_removed(tmp_path):
    first = iteration(tmp_path, 10)
    second = iteration(tmp_path, 20)
    write_latest(tmp_path, 10)
    resolve, found = resolve_checkpoint, []

    def removed_afterwards(path, base=None):
        found.append(resolve(path, base))
        if len(found) == 1:
            hide(first)
            write_latest(tmp_path, 20)
        return found[-1]

    with (
        mock.patch("megatron_moe_lpr.checkpoint.format.trainable_only.resolve_checkpoint", removed_afterwards),
        kept_for_reading(tmp_path) as path,
    ):
        assert path == second and is_locked(second)
    assert not is_locked(second)


def test_what_it_builds_on_is_kept_too(tmp_path):
    base = iteration(tmp_path / "base", 10)
    top = iteration(tmp_path / "top", 5, base=record_base(resolve_checkpoint(base)))
    assert json.loads((top / "moe_lpr" / "card.json").read_text())["base"]["path"] == str(base)
    with kept_for_reading(tmp_path / "top") as path:
        assert path == top and is_locked(top) and is_locked(base)
    assert not is_locked(base)


def test_one_that_is_replaced_while_it_is_read_is_told(tmp_path):
    """A run that repeats its steps after a fall-back saves the same step again."""
    iteration(tmp_path, 10)
    with pytest.raises(RemovedCheckpoint, match="replaced while it was read"), kept_for_reading(tmp_path):
        iteration(tmp_path, 10)
    with kept_for_reading(tmp_path, to_the_end=False) as path:
        iteration(tmp_path, 10)
    assert path.is_dir()
