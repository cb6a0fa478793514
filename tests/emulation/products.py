"""Matrix products: the conditions of cuBLASLt and of common/gemm/cublaslt_gemm.cu, fp32 accumulation.

`A` and `B` are named as by cuBLAS: row-major, the result is B (transposed where `transb`) times A (where not `transa`).
"""

import os

import torch

from tests.emulation.engine import Quantized, Quantizer, engine
from tests.emulation.fp8 import decode
from tests.emulation.kernels import contiguous, kernel, refuse_unless
from tests.emulation.names import TORCH_DTYPE, DType, Float8BlockScaleTensorFormat
from tests.emulation.quantization import quantized

ALIGNMENT = 16
BLOCKWISE_ROWS = 8
TF32 = "NVIDIA_TF32_OVERRIDE"
GEMM_READY = Float8BlockScaleTensorFormat["GEMM_READY"]


def _in_fp8(operand: torch.Tensor | Quantized) -> bool:
    return isinstance(operand, (engine().Float8TensorStorage, engine().Float8BlockwiseQTensorStorage))


def _matrix(tensor: torch.Tensor | Quantized, transposed: bool, is_a: bool, what: str) -> torch.Tensor:
    """An operand as stored, two-dimensional, before the layout's transposition; FP8 in fp32."""
    if not _in_fp8(tensor):
        contiguous(what, tensor)
        return tensor.detach().reshape(-1, tensor.shape[-1])
    # Hopper multiplies rows by rows alone: A is read by rows where it is transposed, B where it is not.
    rowwise = transposed if is_a else not transposed
    if isinstance(tensor, engine().Float8TensorStorage):
        return _tensorwise(tensor, rowwise, what)
    return _blockwise(tensor, rowwise, what)


def _tensorwise(tensor: Quantized, rowwise: bool, what: str) -> torch.Tensor:
    if rowwise:
        refuse_unless(tensor._data is not None, f"{what}: no row-wise data")
        data = tensor._data.reshape(-1, tensor._data.shape[-1])
    else:
        usable = tensor._transpose is not None and not tensor._transpose_invalid
        refuse_unless(usable, f"{what}: no column-wise data")
        data = tensor._transpose.reshape(tensor._transpose.shape[0], -1)
    contiguous(what, data)
    _aligned(data.shape[1], f"{what}: inner dimension")
    values = decode(data, tensor._fp8_dtype) * tensor._scale_inv.reshape(())
    return values if rowwise else values.t()


def _blockwise(tensor: Quantized, rowwise: bool, what: str) -> torch.Tensor:
    # Newer versions know no other format.
    ready = getattr(tensor, "_data_format", GEMM_READY) == GEMM_READY
    refuse_unless(ready, f"{what}: compact block scales, as they travel between ranks")
    data = tensor._rowwise_data if rowwise else tensor._columnwise_data
    refuse_unless(data is not None, f"{what}: no {'row' if rowwise else 'column'}-wise data")
    contiguous(what, data)
    # Column-wise data of [..., n] lies as [n, ...], which the product takes as n rows.
    _aligned(data.shape[-1] if rowwise else data[0].numel(), f"{what}: inner dimension")
    parts = tensor.get_metadata()
    other = "columnwise" if rowwise else "rowwise"
    parts |= {f"{other}_data": None, f"{other}_scale_inv": None}
    values = engine().Float8BlockwiseQTensorStorage(**parts).dequantize(dtype=torch.float32)
    return values.reshape(-1, values.shape[-1])


def _aligned(size: int, what: str) -> None:
    refuse_unless(size % ALIGNMENT == 0, f"{what} {size} is not a multiple of {ALIGNMENT}")


def _check_formats(a: torch.Tensor | Quantized, b: torch.Tensor | Quantized, what: str) -> bool:
    """Whether the product is one of FP8 numbers."""
    in_fp8 = [_in_fp8(operand) for operand in (a, b)]
    refuse_unless(in_fp8[0] == in_fp8[1], f"{what}: one operand in FP8, the other not")
    if not in_fp8[0]:
        refuse_unless(a.dtype == b.dtype, f"{what}: {a.dtype} times {b.dtype}")
        return False
    blocks = [isinstance(operand, engine().Float8BlockwiseQTensorStorage) for operand in (a, b)]
    refuse_unless(blocks[0] == blocks[1], f"{what}: one operand with block scales, the other not")
    formats = {DType(operand._fp8_dtype) for operand in (a, b)}
    refuse_unless(formats != {DType.kFloat8E5M2}, f"{what}: E5M2 times E5M2")
    squares = blocks[0] and a._is_2D_scaled and b._is_2D_scaled
    refuse_unless(not squares, f"{what}: square blocks times square blocks")
    return True


def product(
    a: torch.Tensor | Quantized, transa: bool, b: torch.Tensor | Quantized, transb: bool, what: str
) -> torch.Tensor:
    """The fp32 result of a product that the device would take."""
    in_fp8 = _check_formats(a, b, what)
    left, right = _matrix(a, transa, True, f"{what}: A"), _matrix(b, transb, False, f"{what}: B")
    left, right = left.t() if transa else left, right.t() if transb else right
    refuse_unless(right.shape[1] == left.shape[0], f"{what}: {tuple(right.shape)} times {tuple(left.shape)}")
    if in_fp8:
        _aligned(left.shape[1], f"{what}: output columns")
        _check_rows(b, right.shape[0], what)
    if not in_fp8 and a.dtype == torch.float32:
        left, right = _as_multiplied(left), _as_multiplied(right)
    return right.float() @ left.float()


def _check_rows(b: Quantized, rows: int, what: str) -> None:
    """Scales by row of B ask for rows in eights."""
    by_row = isinstance(b, engine().Float8BlockwiseQTensorStorage) and not b._is_2D_scaled
    refuse_unless(not by_row or rows % BLOCKWISE_ROWS == 0, f"{what}: {rows} rows of B, not a multiple of 8")


def _as_multiplied(values: torch.Tensor) -> torch.Tensor:
    """fp32 operands in TF32, 10 bits of mantissa, unless the environment forbids it as cuBLAS lets it."""
    if os.environ.get(TF32) == "0":
        return values
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def _column_sums(b: torch.Tensor | Quantized, transb: bool, what: str) -> torch.Tensor:
    by_blocks = isinstance(b, engine().Float8BlockwiseQTensorStorage)
    refuse_unless(not by_blocks, f"{what}: not beside a product of numbers with block scales")
    return _matrix(b, transb, False, what).float().sum(0)


def _result_dtype(a: torch.Tensor | Quantized, out: torch.Tensor | None, output_dtype: DType | None) -> torch.dtype:
    if out is not None:
        dtype = out.dtype
        wanted = dtype if output_dtype is None else TORCH_DTYPE[DType(output_dtype)]
        refuse_unless(dtype == wanted, f"gemm: {wanted} is asked for, the result is {dtype}")
    elif output_dtype is not None:
        dtype = TORCH_DTYPE[DType(output_dtype)]
    else:
        dtype = a.dtype if isinstance(a, torch.Tensor) else torch.float32
    wide_input = not _in_fp8(a)
    refuse_unless(
        not wide_input or dtype in (a.dtype, torch.float32), f"gemm: {getattr(a, 'dtype', None)} operands into {dtype}"
    )
    return dtype


@kernel("cpp_extensions/gemm.py `general_gemm`")
def generic_gemm(
    A: torch.Tensor | Quantized,
    transA: bool,
    B: torch.Tensor | Quantized,
    transB: bool,
    D: torch.Tensor | None,
    quantizer: Quantizer | None,
    output_dtype: DType | None,
    bias: torch.Tensor | None,
    bias_type: DType,
    gelu: bool,
    gelu_in: torch.Tensor | None,
    grad: bool,
    workspace: torch.Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: object = None,
    comm_type: object = None,
    extra_output: torch.Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple:
    """The product, with bias forward or the bias's gradient backward."""
    refuse_unless(comm_overlap is None and not bulk_overlap, "gemm: overlap with communication is not emulated")
    refuse_unless(not gelu, "gemm: fused GELU is not emulated")
    refuse_unless(extra_output is None, "gemm: an extra output is not emulated")
    refuse_unless(beta in (None, float(accumulate)), f"gemm: beta {beta} with accumulate={accumulate}")
    result = product(A, transA, B, transB, "gemm") * alpha
    dtype, bias_grad = _result_dtype(A, D, output_dtype), None
    if bias is not None and grad:
        bias_grad = _column_sums(B, transB, "gemm: gradient of the bias").to(TORCH_DTYPE[DType(bias_type)])
    elif bias is not None:
        fitting = (dtype,) if dtype != torch.float32 else (torch.float32, torch.bfloat16)
        refuse_unless(bias.dtype in fitting, f"gemm: bias in {bias.dtype}, result in {dtype}")
        result = result + bias.float()
    shape = tuple(result.shape) if transB else (*tuple(B.size())[:-1], result.shape[1])
    if D is not None:
        refuse_unless(tuple(D.shape) == shape, f"gemm: {shape} numbers into {tuple(D.shape)}")
        _store(D, result, accumulate)
        out = D
    else:
        out = result.to(dtype).view(shape)
    return out if quantizer is None else quantized(out, quantizer), bias_grad, gelu_in, extra_output


def _store(target: torch.Tensor, result: torch.Tensor, accumulate: bool) -> None:
    contiguous("gemm: the result", target)
    view = target.view(result.shape)
    view.copy_(result + view.float() if accumulate else result)


@kernel("cpp_extensions/gemm.py `general_grouped_gemm`")
def te_general_grouped_gemm(
    A: list[torch.Tensor | Quantized],
    transa: bool,
    B: list[torch.Tensor | Quantized],
    transb: bool,
    D: list[torch.Tensor] | None,
    D_type: DType,
    m_splits: list[int],
    bias: list[torch.Tensor],
    bias_type: DType,
    single_output: bool,
    pre_gelu_out: list[torch.Tensor],
    grad: bool,
    workspace: list[torch.Tensor],
    workspaceSize: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> list[torch.Tensor]:
    """A product for each expert; one without tokens leaves zeros."""
    refuse_unless(D is not None, "grouped gemm: without an output it is not emulated")
    targets = torch.split(D[0], m_splits) if single_output else D
    for index, (a, b, target) in enumerate(zip(A, B, targets, strict=True)):
        what = f"grouped gemm of expert {index}"
        if a.size().numel() == 0 or b.size().numel() == 0:
            _nothing(target, bias[index], grad, accumulate)
            continue
        result = product(a, transa, b, transb, what)
        if bias[index].numel() and grad:
            bias[index].copy_(_column_sums(b, transb, what))
        elif bias[index].numel():
            result = result + bias[index].float()
        _store(target, result, accumulate)
    return bias


def _nothing(target: torch.Tensor, bias: torch.Tensor, grad: bool, accumulate: bool) -> None:
    if target.numel() and not accumulate:
        target.zero_()
    if grad and bias.numel():
        bias.zero_()
