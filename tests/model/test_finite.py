"""`is_finite`: every kind of value, sums that overflow, and the memory it needs."""

import pytest
import torch

from megatron_moe_lpr.model.finite import CHUNK, is_finite

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_among_many(dtype, value):
    tensor = torch.ones(3, 50).to(dtype)
    assert is_finite(tensor)
    tensor[2, 7] = torch.tensor(value).to(dtype)
    assert not is_finite(tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_whose_sum_overflows_are_finite(dtype):
    tensor = torch.full((CHUNK + 8,), torch.finfo(dtype).max, dtype=dtype)
    assert not torch.isfinite(tensor.sum()) and is_finite(tensor)
    tensor[-1] = float("inf")
    assert not is_finite(tensor)


def test_what_has_no_such_values():
    assert is_finite(torch.tensor([1, 2])) and is_finite(torch.empty(0, 3)) and is_finite(torch.tensor(True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_copy_is_made(dtype):
    tensor = torch.zeros(1 << 20, dtype=dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        assert is_finite(tensor)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert allocated < 1000
