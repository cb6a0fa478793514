"""Launch defaults by platform: on where their requirement is there, off where it is missing."""

import pytest
import torch
from packaging.version import Version

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.kernels import check_dispatcher, platform_fields
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import GPUFacts, Platform

CPU = Platform("cpu", "gloo", torch.device("cpu"), transformer_engine=False)
EP2 = ParallelLayout(expert_model_parallel_size=2)


def gpu(version: str = "2.11.0", **facts) -> Platform:
    found = GPUFacts((9, 0), (13, 0), Version(version), **facts)
    return Platform("cuda", "nccl", torch.device("cuda", 0), transformer_engine=True, gpu=found)


def test_cpu_takes_local_layers_and_no_fusion():
    fields = platform_fields(CPU)
    assert fields["transformer_impl"] == "local"
    assert not any(name.endswith("fusion") for name in fields)


def test_fusions_follow_what_is_installed():
    old, new = platform_fields(gpu("2.6.0")), platform_fields(gpu("2.7.0", fused_weight_gradients=True))
    assert (old["moe_router_fusion"], new["moe_router_fusion"]) == (False, True)
    assert (old["gradient_accumulation_fusion"], new["gradient_accumulation_fusion"]) == (False, True)
    assert old["moe_permute_fusion"]
    assert not platform_fields(gpu("2.0"))["moe_permute_fusion"]


@pytest.mark.parametrize(
    ("platform", "layout", "experts", "message"),
    [
        (CPU, EP2, 5, "needs NVIDIA GPUs"),
        (gpu(), EP2, 5, "needs the package deep_ep"),
        (gpu(deep_ep=True), ParallelLayout(), 5, "needs --expert-model-parallel-size over 1"),
        (gpu(deep_ep=True), EP2, 2, "top-2 needs at least 2 new experts, and there are 1"),
    ],
)
def test_flex_dispatcher_without_what_it_needs(platform, layout, experts, message):
    with pytest.raises(UserError, match=message):
        check_dispatcher("flex", layout, experts, 2, platform)


def test_dispatchers_that_fit():
    check_dispatcher("flex", EP2, 5, 2, gpu(deep_ep=True))
    check_dispatcher("alltoall", ParallelLayout(), 5, 2, CPU)
