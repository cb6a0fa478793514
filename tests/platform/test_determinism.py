"""--deterministic-mode: what it sets, and what it refuses."""

import pytest
import torch

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.config import check_platform, transformer_config
from megatron_moe_lpr.model.configuration.kernels import platform_fields
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import GPUFacts, Platform
from megatron_moe_lpr.platform.determinism import VARIABLES, fix_order_of_sums
from tests.model.sizes import small_shape

SET = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@pytest.fixture(autouse=True)
def _as_before():
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills


def test_variables_and_torch_are_set():
    environment = {}
    fix_order_of_sums(environment)
    assert environment == SET
    assert torch.are_deterministic_algorithms_enabled()


def test_other_values_that_keep_the_order_stay():
    chosen = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "NCCL_ALGO": "Tree", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    environment = dict(chosen)
    fix_order_of_sums(environment)
    assert environment == chosen


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("value", ["1", ""])
def test_any_further_value_is_refused(name, value):
    with pytest.raises(UserError, match=f"^{name}={value}: --deterministic-mode needs .*; unset the variable$"):
        fix_order_of_sums({name: value})
    assert not torch.are_deterministic_algorithms_enabled()


def gpu() -> Platform:
    from packaging.version import Version

    facts = GPUFacts((9, 0), (13, 0), Version("2.11"), fused_weight_gradients=False, deep_ep=True)
    return Platform("cuda", "nccl", torch.device("cpu"), transformer_engine=True, gpu=facts)


def test_the_flex_dispatcher_is_refused():
    layout = ParallelLayout(expert_model_parallel_size=2)
    options = ComputeOptions(deterministic_mode=True, moe_token_dispatcher_type="flex")
    with pytest.raises(UserError, match=r"^--deterministic-mode: the order of DeepEP's sums is not known"):
        check_platform(small_shape(experts=5), layout, options, gpu())


@pytest.mark.parametrize("on", [False, True])
def test_megatron_chooses_its_kernels_by_it(on):
    fields = platform_fields(gpu(), torch.bfloat16, deterministic=on)
    assert (fields.get("deterministic_mode", False), fields["cross_entropy_loss_fusion"]) == (on, not on)


def test_cpus_add_up_in_the_same_order_anyway(cpu_platform):
    options = ComputeOptions(fp32=True, deterministic_mode=True)
    assert not transformer_config(small_shape(experts=5), ParallelLayout(), cpu_platform, options).deterministic_mode
