"""The CPU platform's stand-ins against what NCCL and CUDA would give."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from tests.distributed import rank_pool


def average() -> float:
    value = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(value, op=dist.ReduceOp.AVG)
    return value.item()


def gather_unequal() -> list[list[float]]:
    rank = dist.get_rank()
    own = torch.full((rank * 2, 3), float(rank + 1))
    pieces = [torch.empty(source * 2, 3) for source in range(dist.get_world_size())]
    dist.all_gather(pieces, own)
    return [piece.flatten().tolist() for piece in pieces]


def scatter_unequal() -> list[float]:
    rank = dist.get_rank()
    pieces = [torch.full((target + 1,), float(10 * target + rank)) for target in range(dist.get_world_size())]
    output = torch.empty(rank + 1)
    dist.reduce_scatter(output, pieces)
    return output.tolist()


def test_all_reduce_averages():
    assert rank_pool(2).run(average) == [1.5, 1.5]


def test_all_gather_of_unequal_and_empty_pieces():
    assert rank_pool(2).run(gather_unequal) == [[[], [2.0] * 6]] * 2


def test_reduce_scatter_of_unequal_pieces():
    assert rank_pool(2).run(scatter_unequal) == [[0.0 + 1.0], [10.0 + 11.0] * 2]


def gloo_devices_after_many_groups() -> int:
    platform = select_platform("cpu")
    for _ in range(3):
        initialize_parallel(platform, ParallelLayout())
    threads = Path("/proc/self/task").glob("*/comm")
    return sum(thread.read_text().strip() == "gloo_tcp_loop" for thread in threads)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists threads as Linux does")
def test_groups_share_one_gloo_device():
    """Each is a thread that wakes a hundred times a second; a run has twenty groups, a pool of ranks hundreds."""
    assert rank_pool(2).run(gloo_devices_after_many_groups) == [1, 1]


def test_cuda_requests_land_on_the_cpu(cpu_platform):
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(2).to("cuda:0").device.type == "cpu"
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.ones(1).type() == "torch.FloatTensor"


def test_device_contexts_still_work():
    code = (
        "from megatron_moe_lpr.platform import select_platform; select_platform('cpu'); import torch\n"
        "with torch.device('meta'): assert torch.empty(2).is_meta and torch.arange(3).is_meta"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("chosen", "expected"), [({}, "64"), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}, "7")])
def test_kernels_of_few_shapes_are_kept_unless_the_user_says_otherwise(chosen, expected):
    code = (
        "from megatron_moe_lpr.platform import select_platform; select_platform('cpu'); import os\n"
        "print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'], os.environ['LRU_CACHE_CAPACITY'])"
    )
    environment = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name} | chosen
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [expected, "64"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc's malloc")
def test_freed_memory_of_large_tensors_is_used_again():
    code = (
        "from megatron_moe_lpr.platform import select_platform; select_platform('cpu'); import resource, torch\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def make(): return [torch.ones(size).sum() for size in (20_000_000, 15_000_000, 10_000_000)]\n"
        "for _ in range(5): make()\n"
        "before = faults(); make()\n"
        "print(faults() - before)"
    )
    # Without large pages, which have few faults anyway: fresh memory would cost 44,000. In the first rounds malloc
    # joins pieces of the heap.
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 1000


@pytest.mark.parametrize(("chosen", "expected"), [({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")])
def test_large_pages_are_asked_for_before_megatron_core_makes_a_tensor(chosen, expected):
    code = (
        "import megatron_moe_lpr.training.configuration.config, os, sys\n"
        "print(os.environ['THP_MEM_ALLOC_ENABLE'], 'megatron.core' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"} | chosen
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [expected, "False"]


def test_random_state_round_trip(cpu_platform):
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_another_platform_is_refused_in_one_process(cpu_platform):
    assert select_platform("auto") is cpu_platform
    with pytest.raises(UserError, match="already runs on cpu"):
        select_platform("cuda")


def test_nothing_is_replaced_before_the_cpu_is_chosen():
    code = (
        "import torch; before = (torch.zeros, torch.Tensor.to, torch.distributed.all_gather, torch.cuda.Stream);"
        "import megatron_moe_lpr.model.build, megatron_moe_lpr.checkpoint.loading.model_state;"
        "after = (torch.zeros, torch.Tensor.to, torch.distributed.all_gather, torch.cuda.Stream);"
        "assert all(a is b for a, b in zip(before, after))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_says_so():
    code = (
        "from megatron_moe_lpr.platform import select_platform; from megatron_moe_lpr.errors import run_command;"
        "run_command(lambda: select_platform('cuda'))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.startswith("error: --platform cuda: no CUDA device is visible")
