"""What of the CUDA platform can be decided without a device."""

from pathlib import Path

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.platform.cuda import (
    MAX_CONNECTIONS,
    TF32_OVERRIDE,
    check_kernel_launch_order,
    keep_fp32_products,
    order_kernel_launches,
)

ROOT = Path(__file__).parents[2]
HOPPER, BLACKWELL = (9, 0), (10, 0)


def test_tensor_parallelism_orders_kernel_launches():
    environment = {}
    order_kernel_launches(environment, 1)
    assert environment == {}
    order_kernel_launches(environment, 2)
    assert environment == {MAX_CONNECTIONS: "1"}
    check_kernel_launch_order(environment, 2, HOPPER)


def test_an_environment_against_it_is_refused():
    environment = {MAX_CONNECTIONS: "32"}
    order_kernel_launches(environment, 2)
    assert environment == {MAX_CONNECTIONS: "32"}
    with pytest.raises(UserError, match="CUDA_DEVICE_MAX_CONNECTIONS=32: --tensor-model-parallel-size over 1 needs 1"):
        check_kernel_launch_order(environment, 2, HOPPER)
    check_kernel_launch_order(environment, 2, BLACKWELL)
    check_kernel_launch_order(environment, 1, HOPPER)


def test_fp32_means_fp32_unless_the_user_says_otherwise():
    environment = {}
    keep_fp32_products(environment)
    assert environment == {TF32_OVERRIDE: "0"}
    chosen = {TF32_OVERRIDE: "1"}
    keep_fp32_products(chosen)
    assert chosen == {TF32_OVERRIDE: "1"}


def test_the_tests_stand_in_for_transformer_engine_is_out_of_the_package_s_reach():
    """Neither its variable nor the module it stands for is named in the package, and nothing imports the tests."""
    for path in (ROOT / "megatron_moe_lpr").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for forbidden in ("NVTE_PROJECT_BUILDING", "transformer_engine_torch", "from tests", "import tests"):
            assert forbidden not in text, f"{path}: {forbidden}"
