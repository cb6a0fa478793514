"""Flags of the optimizer's state: what excludes what, in one line."""

import dataclasses

import pytest
import torch

from megatron_moe_lpr.engine.state_options import OptimizerStateOptions, check_optimizer_states
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.platform import Platform
from megatron_moe_lpr.training.configuration.description import ACCEPTABLE

CPU = Platform("cpu", "gloo", torch.device("cpu"), transformer_engine=False)
GPU = dataclasses.replace(CPU, name="cuda", backend="nccl", transformer_engine=True)
PRECISE = OptimizerStateOptions(use_precision_aware_optimizer=True)
OFFLOAD = {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exp_avg_dtype": "bf16"}, "--exp-avg-dtype bf16: needs --use-precision-aware-optimizer"),
        ({"exp_avg_sq_dtype": "bf16"}, "--exp-avg-sq-dtype bf16: needs --use-precision-aware-optimizer"),
        ({"main_grads_dtype": "bf16"}, "--main-grads-dtype bf16: needs --use-precision-aware-optimizer"),
        ({"exp_avg_dtype": "fp8"}, "--exp-avg-dtype fp8: is scaled .* choose fp32 or bf16"),
        ({"exp_avg_sq_dtype": "fp16"}, "--exp-avg-sq-dtype fp16: is scaled .* choose fp32 or bf16"),
        ({"main_params_dtype": "fp16"}, "--main-params-dtype fp16: is scaled .* choose fp32$"),
        ({"optimizer_cpu_offload": True}, "--optimizer-cpu-offload: needs --use-precision-aware-optimizer"),
        ({"overlap_cpu_optimizer_d2h_h2d": True}, "--overlap-cpu-optimizer-d2h-h2d: needs --optimizer-cpu-offload"),
        ({"optimizer_offload_fraction": 0.5}, "--optimizer-offload-fraction: needs --optimizer-cpu-offload"),
        (OFFLOAD | {"optimizer_offload_fraction": 0.5}, "--optimizer-offload-fraction 0.5: .* leave it at 1"),
        (OFFLOAD | {"exp_avg_dtype": "bf16"}, "moments on the host are fp32"),
    ],
)
def test_formats_that_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        OptimizerStateOptions(**fields)


@pytest.mark.parametrize(
    ("options", "dtype", "platform", "message"),
    [
        (PRECISE, torch.bfloat16, CPU, "--use-precision-aware-optimizer: needs Transformer Engine.* --platform cpu"),
        (PRECISE, torch.float32, GPU, "--use-precision-aware-optimizer: needs bf16"),
        (PRECISE, torch.bfloat16, GPU, None),
        (OptimizerStateOptions(), torch.float32, CPU, None),
    ],
)
def test_what_platform_and_dtype_lack(options, dtype, platform, message):
    if message is None:
        check_optimizer_states(options, dtype, platform)
        return
    with pytest.raises(UserError, match=message):
        check_optimizer_states(options, dtype, platform)


def test_formats_decide_numbers():
    assert {"exp_avg_dtype", "exp_avg_sq_dtype", "main_grads_dtype"} <= set(ACCEPTABLE)
    assert "use_precision_aware_optimizer" not in ACCEPTABLE
