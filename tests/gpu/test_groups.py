"""Process groups of the CUDA platform: made, left for another layout, and ended at the end of a run."""

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_moe_lpr.parallel.groups import destroy_parallel, initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from tests.gpu import device, ranks
from tests.gpu.ranks import run


def change_layouts_and_end() -> tuple[list[int], bool, bool]:
    """On every rank: EP sizes that were in force; whether gloo groups lay beside NCCL's; whether a world is left."""
    platform = select_platform("cuda", 2)
    sizes = []
    for fields in ({}, {"expert_model_parallel_size": 2}, {"tensor_model_parallel_size": 2}, {}):
        initialize_parallel(platform, ParallelLayout(**fields))
        sizes.append(parallel_state.get_expert_model_parallel_world_size())
    beside = parallel_state.get_data_parallel_group_gloo() is not None
    destroy_parallel()
    left = dist.is_initialized()
    return sizes, beside, left


def test_every_run_ends_its_groups_once():
    """Megatron ends the gloo groups beside NCCL's by itself; to end one twice is an error."""
    if device.count() < 2:
        pytest.skip("needs 2 GPUs")
    assert run(2, change_layouts_and_end) == [([1, 2, 1, 1], True, False)] * 2
    ranks.close()  # these have no world any more


def send_and_overwrite() -> list[float]:
    """On every rank: what arrives of a tensor that its sender overwrites as soon as it is sent."""
    place = torch.device("cuda", dist.get_rank()) if not device.EMULATED else torch.device("cpu")
    value = torch.full((100_000,), 1.0, device=place)
    if dist.get_rank() == 0:
        work = dist.batch_isend_irecv([dist.P2POp(dist.isend, value, 1)])
        value.zero_()
    else:
        value.zero_()
        work = dist.batch_isend_irecv([dist.P2POp(dist.irecv, value, 0)])
    for part in work:
        part.wait()
    return sorted(set(value.tolist()))


def test_what_was_sent_may_be_freed():
    """Pipeline stages free their outputs once they are sent. NCCL sends what the memory held in the order of the
    stream; gloo reads it later, and the emulated device hands it a copy: without it interleaved PP2 is wrong."""
    if device.count() < 2:
        pytest.skip("needs 2 GPUs")
    assert run(2, send_and_overwrite) == [[0.0], [1.0]]
