"""A --save that is not the directory it was: not mounted anywhere, or not on every node."""

import functools
import os
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_moe_lpr.checkpoint.format.directory import write_latest
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.training.run_directory import start_marker
from megatron_moe_lpr.training.run_directory.start_marker import (
    MARKER,
    check_same_directory,
    mark_start,
    refuse_lost_directory,
)
from tests.distributed import rank_pool
from tests.training.outcomes import train_outcome
from tests.training.runs import make_checkpoint, make_data, metrics

NOWHERE = Path("no-such-checkpoint")
SLURM, TORCHRUN = {"SLURM_RESTART_COUNT": "1"}, {"TORCHELASTIC_RESTART_COUNT": "2"}


@pytest.mark.parametrize("restarted", [SLURM, TORCHRUN])
@pytest.mark.parametrize("exists", [True, False])
def test_a_start_that_is_not_the_first_finds_a_trace(restarted, exists, tmp_path, monkeypatch):
    save = tmp_path / "mount" / "run"
    (save / "logs").mkdir(parents=True) if exists else None  # the job's script makes it
    (save / ".slurm-progress").touch() if exists else None
    refuse_lost_directory(save, NOWHERE)  # a first start needs nothing
    for name, count in restarted.items():
        monkeypatch.setenv(name, count)
    with pytest.raises(UserError, match=f"{next(iter(restarted))} .*is its file system mounted on") as caught:
        refuse_lost_directory(save, NOWHERE)
    assert save.exists() == exists
    # What the message advises.
    assert f"mkdir -p '{save}' && touch '{save / MARKER}'" in str(caught.value)
    save.mkdir(parents=True, exist_ok=True)
    (save / MARKER).touch()
    refuse_lost_directory(save, NOWHERE)


@pytest.mark.parametrize("name", ["run.lock", "metrics.jsonl", "iter_0000100", "damaged-iter_0000100"])
def test_what_older_versions_left_is_a_trace(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    (tmp_path / name).mkdir()
    refuse_lost_directory(tmp_path, NOWHERE)


@pytest.mark.parametrize("count", ["", "0", "none"])
def test_no_restart(count, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    refuse_lost_directory(tmp_path / "new", NOWHERE)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("RANK", "1")
    refuse_lost_directory(tmp_path / "new", NOWHERE)


def test_a_later_stage_of_a_requeued_job_begins(tmp_path, monkeypatch):
    """A script that runs both stages was stopped in the first, or between them."""
    first, second = tmp_path / "stage1", tmp_path / "stage2"
    (first / "iter_0000010").mkdir(parents=True)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    mark_start(first)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for load in (first, first / "iter_0000010"):
        refuse_lost_directory(second, load)
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    with pytest.raises(UserError, match="is its file system mounted"):
        refuse_lost_directory(second, first)


def test_each_start_is_another(tmp_path):
    contents = []
    for _ in range(2):
        mark_start(tmp_path)
        contents.append((tmp_path / MARKER).read_text())
    assert contents[0] != contents[1]


def started_again(environment: dict[str, str], *arguments, **changes) -> str | None:
    with mock.patch.dict(os.environ, environment):
        return train_outcome(*arguments, **changes)


def test_a_requeued_run(tmp_path):
    """Killed before its first save it begins again; unmounted it is refused, and mounted again it goes on."""
    load, data, save = make_checkpoint(tmp_path), make_data(tmp_path), tmp_path / "run"
    save.mkdir()
    mark_start(save)
    restart = functools.partial(started_again, SLURM, load, save, data, train_iters=2)
    assert rank_pool(2).run(functools.partial(restart, save_interval=1)) == [None, None]
    assert sorted(metrics(save)) == [1, 2]
    save.rename(tmp_path / "unmounted")
    save.mkdir()
    first = refused(restart)
    assert "SLURM has requeued this job" in first and list(save.iterdir()) == []
    save.rmdir()
    (tmp_path / "unmounted").rename(save)
    write_latest(save, 1)
    assert rank_pool(2).run(restart) == [None, None]
    assert sorted(metrics(save)) == [1, 2]


def refused(task) -> str:
    """Rank 0 alone says why, before there are groups; so this process does what it does."""
    outcome = task()
    assert isinstance(outcome, str)
    return outcome


def seen_by(rank_without: int | None, save, content: str | None) -> str | None:
    """On every rank of a pool: the error where one rank sees something else in `save`."""
    read = start_marker._read
    is_without = dist.get_rank() == rank_without
    if dist.get_rank() == 0:
        mark_start(save)
    dist.barrier()
    with (
        mock.patch.object(start_marker, "PAUSES", (0.01,)),
        mock.patch.object(start_marker, "_read", lambda path: content if is_without else read(path)),
    ):
        try:
            check_same_directory(save)
        except UserError as error:
            return str(error)
    return None


@pytest.mark.parametrize("content", [None, '{"start": "of another directory"}'])
def test_a_node_without_the_file_system_is_named(content, tmp_path):
    first, second = rank_pool(2).run(seen_by, 1, tmp_path, content)
    assert first == second and "rank 1 on" in first and "does not see what rank 0" in first
    assert rank_pool(2).run(seen_by, None, tmp_path, None) == [None, None]
