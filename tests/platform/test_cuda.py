"""What of the CUDA platform can be decided without a device."""

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.platform.cuda import MAX_CONNECTIONS, check_kernel_launch_order, order_kernel_launches

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
