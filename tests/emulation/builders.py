"""Quantizers and quantised tensors for the tests of the emulation."""

from typing import Any

import torch

from tests.emulation.engine import Quantized, Quantizer, engine
from tests.emulation.kernels import FUNCTIONS
from tests.emulation.names import DType
from tests.emulation.table import TABLE, VERSIONS, read

E4M3, E5M2 = DType["kFloat8E4M3"], DType["kFloat8E5M2"]
TORCH = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
CPU = torch.device("cpu")


def call(name: str, **fields: Any) -> Any:
    """Call a function of the extension, its arguments in this version's order.

    Fields that only other versions know are left out; one that no version knows raises TypeError.
    """
    known = {argument.name for version in VERSIONS for argument in read(version).functions.get(name, ())}
    if fields.keys() - known:
        raise TypeError(f"no version of {name} has {', '.join(fields.keys() - known)}")
    signature = TABLE.functions[name]
    if any(argument.positional_only for argument in signature):
        return FUNCTIONS[name](*(fields[argument.name] for argument in signature))
    own = {argument.name for argument in signature}
    return FUNCTIONS[name](**{key: value for key, value in fields.items() if key in own})


def delayed(scale: float = 1.0, dtype: DType = E4M3, **usage: bool) -> Quantizer:
    """Delayed scaling with a scale from earlier steps."""
    return engine().Float8Quantizer(torch.tensor([scale]), torch.zeros(1), dtype, **usage)


def tensorwise(dtype: DType = E4M3, **options: object) -> Quantizer:
    """Scaling by the tensor itself."""
    return engine().Float8CurrentScalingQuantizer(dtype, CPU, **options)


def blockwise(dims: int = 1, dtype: DType = E4M3, **options: object) -> Quantizer:
    """Blocks of 128 in a row (1), or of 128 x 128 (2)."""
    usage = {"rowwise": True, "columnwise": True}
    return engine().Float8BlockQuantizer(dtype, block_scaling_dim=dims, **(usage | options))


def values(quantised: Quantized) -> torch.Tensor:
    """What the numbers of a tensor stand for, row-wise, in float64."""
    if isinstance(quantised, engine().Float8TensorStorage):
        return quantised._data.view(TORCH[quantised._fp8_dtype]).double() * quantised._scale_inv.double()
    data = quantised._rowwise_data.view(TORCH[quantised._fp8_dtype]).double()
    return data * by_element(quantised._rowwise_scale_inv.double(), data.shape, quantised._is_2D_scaled)


def by_element(scales: torch.Tensor, shape: torch.Size, squares: bool) -> torch.Tensor:
    """The scale of every number: [blocks, blocks] of squares, [blocks of a row, rows] of rows."""
    rows, columns = shape
    scales = scales.repeat_interleave(128, 0) if squares else scales.t()
    return scales.repeat_interleave(128, 1)[:rows, :columns]
