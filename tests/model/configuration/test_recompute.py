"""Flags of activation recompute that do not go together, and those that do, as Megatron-Core itself judges them."""

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.fp8 import FP8Options
from megatron_moe_lpr.model.configuration.recompute import MODULES, NOT_DELAYED, check_recompute

DELAYED = FP8Options(fp8_format="hybrid", fp8_recipe="delayed")
TENSORWISE = FP8Options(fp8_format="hybrid", fp8_recipe="tensorwise")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("selective", 1, None, FP8Options()), "--recompute-num-layers"),
        (("full", 1, ("moe",), FP8Options()), "--recompute-modules needs --recompute-granularity selective"),
        ((None, None, ("moe",), FP8Options()), "--recompute-modules needs"),
        (("selective", None, ("attention",), FP8Options()), "--recompute-modules attention is not one of core_attn"),
        *[(("selective", None, ("core_attn", module), DELAYED), f"{module} does not go") for module in NOT_DELAYED],
    ],
)
def test_flags_that_do_not_go_together(given, message):
    with pytest.raises(UserError, match=message):
        check_recompute(*given)


@pytest.mark.parametrize("fp8", [FP8Options(), TENSORWISE], ids=["bf16", "tensorwise"])
def test_flags_that_do(fp8):
    check_recompute(None, None, None, fp8)
    check_recompute("full", 2, None, fp8)
    check_recompute("selective", None, None, fp8)
    check_recompute("selective", None, MODULES, fp8)
    check_recompute("selective", None, [module for module in MODULES if module not in NOT_DELAYED], DELAYED)
