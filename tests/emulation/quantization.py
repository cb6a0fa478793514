"""The extension's functions that quantise and back, whatever the recipe."""

import torch

from tests.emulation.blockwise import empty_blockwise, quantize_blockwise
from tests.emulation.engine import Quantized, Quantizer, engine
from tests.emulation.kernels import KernelRefuses, kernel, refuse_unless
from tests.emulation.names import DType
from tests.emulation.tensorwise import dequantize_tensorwise, dequantized_dtype, empty_tensorwise, quantize_tensorwise

WIDE = (torch.float32, torch.bfloat16, torch.float16)


def quantized(tensor: torch.Tensor, quantizer: Quantizer, output: object = None) -> object:
    """What `quantize` gives, for the kernels that end with it."""
    refuse_unless(tensor.dtype in WIDE, f"quantize: {tensor.dtype} is no wide format")
    if isinstance(quantizer, (engine().Float8Quantizer, engine().Float8CurrentScalingQuantizer)):
        return quantize_tensorwise(tensor, quantizer, output)
    if isinstance(quantizer, engine().Float8BlockQuantizer):
        return quantize_blockwise(tensor, quantizer, output)
    raise KernelRefuses(f"quantize: {type(quantizer).__name__} does not run on Hopper, or is not emulated")


@kernel("tensor/float8_tensor.py, tensor/float8_blockwise_tensor.py: `quantize_impl`, `update_quantized`")
def quantize(
    tensor: torch.Tensor, quantizer: Quantizer, output: object = None, noop: torch.Tensor | None = None
) -> object:
    """A wide tensor in FP8; `noop` is a flag on the device that leaves the output as it is."""
    if noop is not None and noop.numel() and float(noop.reshape(-1)[0]) != 0.0:
        return output
    return quantized(tensor, quantizer, output)


@kernel("tensor/storage/float8_tensor_storage.py `_FromFloat8Func`")
def dequantize(input: Quantized, otype: DType) -> torch.Tensor:
    """Back to a wide format; block-scaled tensors do it in Python."""
    refuse_unless(isinstance(input, engine().Float8TensorStorage), f"dequantize: {type(input).__name__}")
    return dequantize_tensorwise(input, dequantized_dtype(otype))


@kernel("module/base.py `grad_output_preprocess`, module/grouped_linear.py")
def bgrad_quantize(input: torch.Tensor, quantizer: Quantizer) -> tuple[torch.Tensor, object]:
    """Column sums and the tensor in FP8."""
    sums = input.reshape(-1, input.shape[-1]).float().sum(0).to(input.dtype)
    return sums, quantized(input, quantizer)


@kernel("module/grouped_linear.py `_GroupedLinear`", name="split_quantize")
def split_quantize_2_11(
    tensor: torch.Tensor, split_sections: list[int], quantizer_list: list[Quantizer]
) -> list[object]:
    """Rows of each expert in FP8."""
    return _split(tensor, split_sections, quantizer_list)


@kernel("module/grouped_linear.py `_GroupedLinear`, module/_split_quantization.py", name="split_quantize")
def split_quantize_2_17(
    tensor: torch.Tensor,
    split_sections: list[int],
    quantizer_list: list[Quantizer],
    disable_bulk_allocation: bool = False,
) -> list[object]:
    """The same; whether the results share an allocation is not seen from here."""
    return _split(tensor, split_sections, quantizer_list)


def _split(tensor: torch.Tensor, sections: list[int], quantizers: list[Quantizer]) -> list[object]:
    refuse_unless(sum(sections) == tensor.shape[0], "split_quantize: the sections are not the tensor's rows")
    pieces = torch.split(tensor, sections)
    return [quantized(piece.contiguous(), quantizer) for piece, quantizer in zip(pieces, quantizers, strict=True)]


@kernel("quantized_tensor.py Quantizer `make_empty`")
def create_empty_quantized_tensor(
    quantizer: Quantizer, shape: list[int], dtype: torch.dtype, device: torch.device, pin_memory: bool
) -> object:
    """A quantised tensor whose numbers are not written yet: NaN here, so that one that is read shows."""
    like = torch.empty(*shape, dtype=dtype)
    if isinstance(quantizer, (engine().Float8Quantizer, engine().Float8CurrentScalingQuantizer)):
        return empty_tensorwise(like, quantizer)
    if isinstance(quantizer, engine().Float8BlockQuantizer):
        return empty_blockwise(like, quantizer)
    raise KernelRefuses(f"create_empty_quantized_tensor: {type(quantizer).__name__} is not emulated")
