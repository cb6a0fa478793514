"""Products of each expert's rows and its matrix: in one launch where PyTorch has a kernel for it, else one each."""

from collections.abc import Sequence
from typing import Any

import torch

ALIGNMENT = 16
"""Rows of operands begin at multiples of so many bytes (aten/native/GroupedMMUtils.h)."""


class GroupedProduct(torch.autograd.Function):
    """A product for each expert's rows, each in its slice of the output: no split copies, no concatenation."""

    @staticmethod
    def forward(
        ctx: Any, rows_RI: torch.Tensor, counts: list[int], in_one_launch: bool, *weights_OI: torch.Tensor
    ) -> torch.Tensor:
        """Rows [rows, input], `counts` of each expert, and matrices [output, input] to [rows, output].

        Args:
            in_one_launch: by `torch.nn.functional.grouped_mm`, which multiplies bf16, where the matrices lie behind
                each other. Those that train lie in the optimizer's buffer, the last one first: there each has a product
                of its own, since copying them would take longer than the launches. Their gradients are one product.
        """
        aligned = all(size * rows_RI.element_size() % ALIGNMENT == 0 for size in weights_OI[0].shape)
        ctx.counts, ctx.grouped = counts, in_one_launch and aligned and len(rows_RI) > 0
        # The rows are for the gradients of weights: where all are frozen, none are kept.
        ctx.save_for_backward(rows_RI if any(ctx.needs_input_grad[3:]) else None, *weights_OI)
        stacked_EOI = _stacked(weights_OI) if ctx.grouped else None
        if stacked_EOI is not None:
            return grouped_mm(rows_RI, stacked_EOI.transpose(1, 2), _ends(counts, rows_RI.device))
        output_RO = rows_RI.new_empty(len(rows_RI), weights_OI[0].shape[0])
        for rows, output, weight in zip(rows_RI.split(counts), output_RO.split(counts), weights_OI, strict=True):
            torch.mm(rows, weight.t(), out=output)
        return output_RO

    @staticmethod
    def backward(ctx: Any, grad_output_RO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the rows and of each matrix that trains; zeros for a matrix without rows."""
        rows_RI, *weights_OI = ctx.saved_tensors
        grad_output_RO = grad_output_RO.contiguous() if ctx.grouped else grad_output_RO
        ends = _ends(ctx.counts, grad_output_RO.device) if ctx.grouped else None
        grad_input_RI = None
        if ctx.needs_input_grad[0]:
            grad_input_RI = _grad_rows(grad_output_RO, weights_OI, ctx.counts, ends)
        if rows_RI is None:
            return grad_input_RI, None, None, *(None for _ in weights_OI)
        return grad_input_RI, None, None, *_grad_weights(grad_output_RO, rows_RI, weights_OI, ctx, ends)


def grouped_mm(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Products of slices of `left` that end at `ends` ([experts], int32): with matrices [experts, input, output], or,
    of columns of `left`, with the same rows of `right`, giving [experts, left's rows, right's columns]."""
    # Public from PyTorch 2.10 on.
    function = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    return function(left, right, offs=ends)


def _ends(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Number of the row behind each expert's, [experts], int32. Copied from pinned memory: the host does not wait."""
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.pin_memory().to(device, non_blocking=True)


def _stacked(weights_OI: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The matrices as one tensor [experts, output, input] that shares their memory; None: they don't lie behind each
    other."""
    first = weights_OI[0]
    whole = first.untyped_storage().data_ptr()
    for index, weight in enumerate(weights_OI):
        begins = first.data_ptr() + index * first.nbytes
        if weight.data_ptr() != begins or weight.untyped_storage().data_ptr() != whole or not weight.is_contiguous():
            return None
    return first.as_strided((len(weights_OI), *first.shape), (first.numel(), *first.stride()))


def _grad_rows(
    grad_output_RO: torch.Tensor,
    weights_OI: Sequence[torch.Tensor],
    counts: list[int],
    ends: torch.Tensor | None,
) -> torch.Tensor:
    stacked_EOI = None if ends is None else _stacked(weights_OI)
    if ends is not None and stacked_EOI is not None:
        return grouped_mm(grad_output_RO, stacked_EOI, ends)
    grad_input_RI = grad_output_RO.new_empty(len(grad_output_RO), weights_OI[0].shape[1])
    grad_slices = zip(grad_output_RO.split(counts), grad_input_RI.split(counts), weights_OI, strict=True)
    for grad_output, grad_input, weight in grad_slices:
        torch.mm(grad_output, weight, out=grad_input)
    return grad_input_RI


def _grad_weights(
    grad_output_RO: torch.Tensor,
    rows_RI: torch.Tensor,
    weights_OI: Sequence[torch.Tensor],
    ctx: Any,
    ends: torch.Tensor | None,
) -> list[torch.Tensor | None]:
    """The gradient of each matrix that trains."""
    counts, trains = ctx.counts, ctx.needs_input_grad[3:]
    if ends is not None and all(trains):
        products = grouped_mm(grad_output_RO.t(), rows_RI, ends)
        return [
            _add_to_buffer(product if count else product.zero_(), weight)
            for product, weight, count in zip(products, weights_OI, counts, strict=True)
        ]
    experts = zip(grad_output_RO.split(counts), rows_RI.split(counts), weights_OI, trains, strict=True)
    return [_grad_weight(*expert) if train else None for *expert, train in experts]


def _grad_weight(grad_output: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of a matrix, from the rows of one expert."""
    buffer = getattr(weight, "main_grad", None)
    if buffer is None or buffer.dtype != rows.dtype:
        return _add_to_buffer(torch.mm(grad_output.t(), rows), weight)
    torch.addmm(buffer, grad_output.t(), rows, out=buffer)
    return _added(weight)


def _add_to_buffer(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Where the optimizer keeps a gradient buffer, add the gradient there."""
    buffer = getattr(weight, "main_grad", None)
    if buffer is None:
        return gradient
    buffer.add_(gradient)
    return _added(weight)


def _added(weight: torch.Tensor) -> torch.Tensor:
    """A tensor without values for autograd: what Megatron's layers return under `gradient_accumulation_fusion`, whose
    mark is set."""
    # An attribute of Megatron's, which torch's class does not have.
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)
