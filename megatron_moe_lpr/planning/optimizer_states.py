"""Bytes of one trained parameter's gradient, AdamW moments and fp32 copy, in the formats of the optimizer's flags."""

from megatron_moe_lpr.model.configuration.fp8 import PARAMETERS_IN_FP8
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.planning.sizes import FP32, RunSizes

BF16 = 2
"""Bytes. Also of what a bf16 weight lacks of an fp32 one."""
SIZES = {"fp32": FP32, "bf16": BF16}


def weight_size(kind: ParameterKind, sizes: RunSizes) -> int:
    """Bytes of a weight that the model computes with; routers are always fp32."""
    return FP32 if kind.is_router else sizes.element_bytes


def gradient_size(kind: ParameterKind, sizes: RunSizes) -> int:
    """Bytes of a gradient in the buffer: fp32, or --main-grads-dtype for weights that are not fp32 themselves."""
    return min(FP32, weight_size(kind, sizes)) if sizes.states.main_grads_dtype == "bf16" else FP32


def moments_size(sizes: RunSizes) -> int:
    """Bytes of both moments."""
    return SIZES[sizes.states.exp_avg_dtype] + SIZES[sizes.states.exp_avg_sq_dtype]


def copy_size(kind: ParameterKind, sizes: RunSizes) -> int:
    """Bytes that the optimizer keeps beside the model's weight, to have it in fp32.

    Where FusedAdam keeps them (--use-precision-aware-optimizer), it also copies weights that are fp32 already. It does
    not keep them under the recipes whose weights may be in FP8 (OptimizerConfig.__post_init__).
    """
    is_fp32 = weight_size(kind, sizes) == FP32
    if not sizes.states.use_precision_aware_optimizer or (
        sizes.precision == "fp8" and sizes.fp8_recipe in PARAMETERS_IN_FP8
    ):
        return 0 if is_fp32 else FP32
    return FP32 if is_fp32 else FP32 - BF16
