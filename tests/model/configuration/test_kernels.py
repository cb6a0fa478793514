"""Launch defaults by platform: on where their requirement is there, off where it is missing."""

import pytest
import torch
from packaging.version import Version

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.kernels import check_dispatcher, chosen_kernels, platform_fields
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import GPUFacts, Platform

CPU = Platform("cpu", "gloo", torch.device("cpu"), transformer_engine=False)
EP2 = ParallelLayout(expert_model_parallel_size=2)


def gpu(version: str = "2.11.0", **facts) -> Platform:
    found = GPUFacts((9, 0), (13, 0), Version(version), **facts)
    return Platform("cuda", "nccl", torch.device("cuda", 0), transformer_engine=True, gpu=found)


def test_cpu_takes_local_layers_and_its_own_swiglu_alone():
    fields = platform_fields(CPU, torch.float32)
    assert fields["transformer_impl"] == "local"
    # The function behind it is platform/torch_only/swiglu.py's, not the one that Megatron compiles.
    assert [name for name in fields if name.endswith("fusion")] == ["bias_activation_fusion"]


@pytest.mark.parametrize(("dtype", "grouped"), [(torch.bfloat16, True), (torch.float32, False)])
def test_a_gpu_without_transformer_engine_takes_nothing_that_needs_it_or_a_compiler(dtype, grouped):
    """Beside SwiGLU, which platform/torch_only/swiglu.py replaces, no fusion; apex's is left alone too."""
    facts = GPUFacts((9, 0), (13, 0), None, fused_weight_gradients=True, grouped_products=True)
    found = Platform("cuda", "nccl", torch.device("cuda", 0), transformer_engine=False, gpu=facts)
    fields = platform_fields(found, dtype)
    assert fields["transformer_impl"] == "local"
    assert [name for name, value in fields.items() if "fusion" in name and value] == ["bias_activation_fusion"]
    assert fields["grouped_products"] is grouped
    assert not {"use_cpu_initialization", "padded_expert_rows"} & fields.keys()


def test_fusions_follow_what_is_installed():
    old, new = (
        chosen_kernels(found, ComputeOptions()) for found in (gpu("2.6.0"), gpu("2.7.0", fused_weight_gradients=True))
    )
    assert (old["moe_router_fusion"], new["moe_router_fusion"]) == (False, True)
    # Transformer Engine's own layers need no apex for it.
    assert (old["gradient_accumulation_fusion"], new["gradient_accumulation_fusion"]) == (False, True)
    assert old["fuse_wgrad_accumulation"] and new["fuse_wgrad_accumulation"]
    assert old["moe_permute_fusion"]
    assert not chosen_kernels(gpu("2.0"), ComputeOptions())["moe_permute_fusion"]


@pytest.mark.parametrize(
    ("flag", "fields"),
    [
        ("moe_permute_fusion", ["moe_permute_fusion"]),
        ("moe_router_fusion", ["moe_router_fusion"]),
        ("gradient_accumulation_fusion", ["fuse_wgrad_accumulation", "gradient_accumulation_fusion"]),
    ],
)
def test_a_flag_switches_its_kernels_off(flag, fields):
    platform = gpu(fused_weight_gradients=True)
    without = chosen_kernels(platform, ComputeOptions(**{flag: False}))
    assert [name for name, on in without.items() if not on] == fields
    assert all(chosen_kernels(platform, ComputeOptions()).values())
    assert chosen_kernels(CPU, ComputeOptions()) == {}


def test_fused_cross_entropy_is_for_bf16_alone():
    """Megatron's rounds the gradients to bf16."""
    fused = {
        dtype: platform_fields(gpu(), dtype)["cross_entropy_loss_fusion"] for dtype in (torch.float32, torch.bfloat16)
    }
    assert fused == {torch.float32: False, torch.bfloat16: True}


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


@pytest.mark.parametrize(
    ("dispatcher", "platform", "message"),
    [
        ("alltoall", gpu(deep_ep=True, hybrid_ep=True), "hybridep: needs --moe-token-dispatcher-type flex"),
        ("flex", gpu(), "needs the package deep_ep"),
        ("flex", gpu(deep_ep=True), "needs HybridEPBuffer of the package deep_ep"),
    ],
)
def test_hybridep_without_what_it_needs(dispatcher, platform, message):
    with pytest.raises(UserError, match=message):
        check_dispatcher(dispatcher, EP2, 5, 2, platform, "hybridep")


def test_dispatchers_that_fit():
    check_dispatcher("flex", EP2, 5, 2, gpu(deep_ep=True))
    check_dispatcher("flex", EP2, 2, 2, gpu(deep_ep=True, hybrid_ep=True), "hybridep")
    check_dispatcher("alltoall", ParallelLayout(), 5, 2, CPU)
