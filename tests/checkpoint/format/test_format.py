"""The streaming writer and reader against torch's and Megatron's own."""

import multiprocessing
import pickle
from enum import Enum
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_moe_lpr.checkpoint.format.reader import CheckpointReader
from megatron_moe_lpr.checkpoint.format.writer import CONTENT_METADATA, CheckpointWriter
from megatron_moe_lpr.errors import UserError
from tests.distributed import rank_pool


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embedding.word_embeddings.weight": torch.randn(12, 6, generator=generator),
        "decoder.final_layernorm.weight": torch.randn(6, generator=generator).bfloat16(),
        "decoder.layers.0.mlp.router.weight": torch.randn(5, 6, generator=generator),
    }


def write(directory: Path, **options: int) -> None:
    with CheckpointWriter(directory, {"iteration": 0}, **options) as writer:
        for key, tensor in some_tensors().items():
            writer.write(key, tensor)


@pytest.mark.parametrize("file_bytes", [1, 1 << 30])
def test_reads_back_what_was_written(file_bytes: int, tmp_path: Path) -> None:
    write(tmp_path, file_bytes=file_bytes)
    assert len(list(tmp_path.glob("*.distcp"))) == (3 if file_bytes == 1 else 1)
    reader = CheckpointReader(tmp_path)
    assert reader.tensors.keys() == some_tensors().keys()
    for key, tensor in some_tensors().items():
        assert reader.read(key).dtype == tensor.dtype and torch.equal(reader.read(key), tensor)
        assert reader.tensors[key].shape == tuple(tensor.shape)


def test_torch_reads_it(tmp_path: Path) -> None:
    write(tmp_path, file_bytes=1)
    state = {key: torch.zeros_like(tensor) for key, tensor in some_tensors().items()}
    torch_checkpoint.load(state, storage_reader=torch_checkpoint.FileSystemReader(tmp_path), no_dist=True)
    assert all(torch.equal(state[key], tensor) for key, tensor in some_tensors().items())


def test_reads_what_torch_writes(tmp_path: Path) -> None:
    torch_checkpoint.save(
        some_tensors(), storage_writer=torch_checkpoint.FileSystemWriter(tmp_path, thread_count=2), no_dist=True
    )
    reader = CheckpointReader(tmp_path)
    assert all(torch.equal(reader.read(key), tensor) for key, tensor in some_tensors().items())


def _sharded(rows: slice, rank: int) -> dict[str, ShardedTensor]:
    tensors = some_tensors()
    weight = tensors.pop("embedding.word_embeddings.weight")
    key = "embedding.word_embeddings.weight"
    state = {key: ShardedTensor.from_rank_offsets(key, weight[rows].contiguous(), (0, rank, 2))}
    for key, tensor in tensors.items():
        state[key] = ShardedTensor.from_rank_offsets(key, tensor, replica_id=rank)
    return state


def _load_on_two_ranks(directory: str) -> bool:
    """Each rank gets its half of the rows from a checkpoint that one process has written."""
    rank = torch.distributed.get_rank()
    rows = slice(6 * rank, 6 * rank + 6)
    expected = {key: entry.data.clone() for key, entry in _sharded(rows, rank).items()}
    state = _sharded(rows, rank)
    for entry in state.values():
        entry.data.zero_()
    loaded = dist_checkpointing.load(state, directory)
    assert loaded["iteration"] == 0
    assert dist_checkpointing.load_content_metadata(directory) == CONTENT_METADATA
    return all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())


def _save_on_two_ranks(directory: str) -> None:
    """Megatron's own writer: one tensor in two chunks of two files, and objects beside the tensors."""
    # Megatron's writer starts processes, which the pool's daemonic ranks may not.
    multiprocessing.current_process()._config["daemon"] = False
    rank = torch.distributed.get_rank()
    state = _sharded(slice(6 * rank, 6 * rank + 6), rank)
    dist_checkpointing.save({**state, "iteration": 7}, directory)


def test_megatron_reads_it_on_two_ranks(tmp_path: Path) -> None:
    write(tmp_path)
    assert rank_pool(2).run(_load_on_two_ranks, str(tmp_path)) == [True, True]


def test_reads_what_megatron_writes_on_two_ranks(tmp_path: Path) -> None:
    rank_pool(2).run(_save_on_two_ranks, str(tmp_path))
    reader = CheckpointReader(tmp_path)
    assert len(reader.metadata.state_dict_metadata["embedding.word_embeddings.weight"].chunks) == 2
    for key, tensor in some_tensors().items():
        assert torch.equal(reader.read(key), tensor), key


def test_an_index_that_runs_code_is_not_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="not the index of a checkpoint"):
        CheckpointReader(tmp_path)
    # Protocol 4 reaches through modules by dotted names.
    reach = b"\x80\x04\x8c\x26torch.distributed.checkpoint.metadata\x8c\x09os.system\x93."
    (tmp_path / ".metadata").write_bytes(reach)
    with pytest.raises(UserError, match="not the index of a checkpoint"):
        CheckpointReader(tmp_path)
    assert not (tmp_path / "ran").exists()


def _as_debian_s_python(member: Enum, protocol: int) -> tuple:
    """How enum pickles a member in the first releases of Python 3.11: by a function that can do anything."""
    return getattr, (type(member), member.name)


def test_an_index_written_by_the_first_releases_of_python_3_11(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (_MEM_FORMAT_ENCODING, WriteItemType):
        monkeypatch.setattr(kind, "__reduce_ex__", _as_debian_s_python)
    state, writer = some_tensors(), torch_checkpoint.FileSystemWriter(tmp_path)
    torch_checkpoint.save(state, storage_writer=writer, no_dist=True)
    # Written by torch two lines above; it is read whole to put one more member of an enumeration into it.
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    metadata.planner_data = WriteItemType.TENSOR
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert b"getattr" in (tmp_path / ".metadata").read_bytes()
    reader = CheckpointReader(tmp_path)
    assert all(torch.equal(reader.read(key), tensor) for key, tensor in state.items())


@pytest.mark.parametrize("kind", [Metadata, torch.Size, _MEM_FORMAT_ENCODING])
def test_that_function_gives_nothing_but_members(kind: type, tmp_path: Path) -> None:
    class Reach:
        def __reduce__(self) -> tuple:
            return getattr, (kind, "__class__")

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Reach()))
    with pytest.raises(UserError, match="not the index of a checkpoint"):
        CheckpointReader(tmp_path)


def test_a_key_written_twice_or_never(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="written twice"), CheckpointWriter(tmp_path, {}) as writer:
        writer.write("decoder.a", torch.ones(1))
        writer.write("decoder.a", torch.ones(1))
    assert not (tmp_path / ".metadata").exists(), "an interrupted checkpoint must not look complete"
    write(tmp_path)
    with pytest.raises(UserError, match=r"no tensor decoder\.b"):
        CheckpointReader(tmp_path).read("decoder.b")


def test_missing_file(tmp_path: Path) -> None:
    write(tmp_path)
    next(tmp_path.glob("*.distcp")).unlink()
    with pytest.raises(UserError, match=r"__0_0\.distcp: no such file"):
        CheckpointReader(tmp_path).read("decoder.final_layernorm.weight")
