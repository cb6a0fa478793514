"""What all ranks have in common is read from common.pt, and from where megatron-core 0.19 saves it."""

import os
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from megatron_moe_lpr.checkpoint.format.common_state import COMMON_ENTRY, COMMON_FILE, read_common
from megatron_moe_lpr.errors import UserError

COMMON = {"counters": {"iteration": 3}, "rng": torch.arange(3), "names": ["a", "b"]}


class Hostile:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("made-by-a-checkpoint",)


def among_the_tensors(directory: Path, content: object) -> Path:
    """As serialization.py `save` of megatron-core 0.19: an object of one shard beside a tensor."""
    planner = DefaultSavePlanner(flatten_state_dict=False)
    state = {COMMON_ENTRY: content, "decoder.weight": torch.ones(2)}
    checkpoint.save(state, checkpoint_id=str(directory), planner=planner, no_dist=True)
    return directory


def test_both_places(tmp_path):
    directory = among_the_tensors(tmp_path, [COMMON])
    found = read_common(directory)
    assert torch.equal(found.pop("rng"), COMMON["rng"]) and found == {key: COMMON[key] for key in ("counters", "names")}
    # A file of that name goes first, as in Megatron.
    torch.save({"counters": {"iteration": 4}}, tmp_path / COMMON_FILE)
    assert read_common(directory) == {"counters": {"iteration": 4}}


@pytest.mark.parametrize("content", [[Hostile()], Hostile(), {"a": Hostile()}])
def test_nothing_in_it_is_run(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    among_the_tensors(tmp_path / "step", content)
    with pytest.raises(UserError, match=r"common\.pt: damaged, or not of a checkpoint: .*mkdir"):
        read_common(tmp_path / "step")
    assert not (tmp_path / "made-by-a-checkpoint").exists()


@pytest.mark.parametrize("content", [[COMMON, COMMON], [[COMMON]], 3])
def test_what_is_no_table_is_refused(content, tmp_path):
    with pytest.raises(UserError, match=r"common\.pt: not of a checkpoint: a dictionary is expected"):
        read_common(among_the_tensors(tmp_path, content))


def test_neither_is_there(tmp_path):
    with pytest.raises(UserError, match=r"common\.pt: no such file; copy the checkpoint again"):
        read_common(tmp_path)
    checkpoint.save({"decoder.weight": torch.ones(2)}, checkpoint_id=str(tmp_path / "step"), no_dist=True)
    with pytest.raises(UserError, match=r"common\.pt: no such file"):
        read_common(tmp_path / "step")


def test_cut_short(tmp_path):
    directory = among_the_tensors(tmp_path, [COMMON])
    for path in directory.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cut short"):
        read_common(directory)
