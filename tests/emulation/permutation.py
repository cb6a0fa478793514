"""Sorting tokens by expert: Triton's kernels by index arithmetic, and the padding of experts' rows for FP8.

Buffers that the real kernels allocate without clearing hold NaN here, so that a row nobody writes shows.
"""

import importlib
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch

from tests.emulation.kernels import contiguous, counted, kernel, refuse_unless

NOWHERE = -(2**30)
TRITON_MODULE = "transformer_engine.pytorch.triton.permutation"


def make_row_id_map(routing_map: torch.Tensor, num_tokens: int, num_experts: int) -> torch.Tensor:
    """[tokens, 2 experts + 1]: rows of a token's copies, their experts, and how many there are."""
    contiguous("make_row_id_map", routing_map)
    refuse_unless(tuple(routing_map.shape) == (num_tokens, num_experts), "make_row_id_map: [tokens, experts]")
    chosen = routing_map.bool()
    rows = (chosen.t().reshape(-1).long().cumsum(0) - 1).view(num_experts, num_tokens).t()
    count = chosen.sum(1)
    order = torch.argsort((~chosen).int(), dim=1, stable=True)
    used = torch.arange(num_experts)[None] < count[:, None]
    nowhere = torch.full_like(order, NOWHERE)
    parts = (torch.where(used, rows.gather(1, order), nowhere), torch.where(used, order, nowhere), count[:, None])
    return torch.cat(parts, 1).int()


def _pairs(row_id_map: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token, expert and row of every copy."""
    used = torch.arange(num_experts)[None] < row_id_map[:, -1:].long()
    tokens = torch.arange(row_id_map.shape[0])[:, None].expand(-1, num_experts)[used]
    experts = row_id_map[:, num_experts : 2 * num_experts][used].long()
    return tokens, experts, row_id_map[:, :num_experts][used].long()


def _uncleared(like: torch.Tensor, *shape: int) -> torch.Tensor:
    fill = float("nan") if like.is_floating_point() else 255
    return torch.full(shape, fill, dtype=like.dtype)


def permute_with_mask_map(
    inp: torch.Tensor,
    row_id_map: torch.Tensor,
    probs: torch.Tensor | None,
    scale: torch.Tensor | None,
    num_tokens: int,
    num_experts: int,
    num_out_tokens: int,
    hidden_size: int,
    scale_hidden_dim: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """A row for each copy of a token, sorted by expert."""
    tokens, experts, rows = _pairs(row_id_map, num_experts)
    fits = rows.numel() == 0 or int(rows.max()) < num_out_tokens
    refuse_unless(fits, f"permute_with_mask_map writes past its {num_out_tokens} rows")
    output = _uncleared(inp, num_out_tokens, hidden_size)
    output[rows] = inp[tokens]
    new_probs = new_scale = None
    if probs is not None:
        new_probs = _uncleared(probs, num_out_tokens)
        new_probs[rows] = probs[tokens, experts] if probs.dim() > 1 else probs[tokens]
    if scale is not None:
        new_scale = _uncleared(scale, num_out_tokens, scale_hidden_dim)
        new_scale[rows] = scale[tokens]
    return output, new_scale, new_probs


def unpermute_with_mask_map(
    inp: torch.Tensor,
    row_id_map: torch.Tensor,
    merging_probs: torch.Tensor | None,
    permuted_probs: torch.Tensor | None,
    num_tokens: int,
    num_experts: int,
    hidden_size: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum of each token's copies, in fp32; zeros for a token without one."""
    tokens, experts, rows = _pairs(row_id_map, num_experts)
    values = inp[rows].float()
    if merging_probs is not None:
        values = values * merging_probs[tokens, experts].float()[:, None]
    output = torch.zeros(num_tokens, hidden_size).index_add(0, tokens, values).to(inp.dtype)
    if permuted_probs is None:
        return output, None
    new_probs = permuted_probs.new_zeros(num_tokens, num_experts)
    new_probs[tokens, experts] = permuted_probs[rows]
    return output, new_probs


def unpermute_with_mask_map_bwd_with_merging_probs(
    fwd_output_grad: torch.Tensor,
    row_id_map: torch.Tensor,
    fwd_input: torch.Tensor,
    merging_probs: torch.Tensor,
    num_tokens: int,
    num_experts: int,
    num_out_tokens: int,
    hidden_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the copies and of their weights."""
    tokens, experts, rows = _pairs(row_id_map, num_experts)
    gradient = fwd_output_grad[tokens].float()
    grad_copies = _uncleared(fwd_output_grad, num_out_tokens, hidden_size)
    grad_copies[rows] = (gradient * merging_probs[tokens, experts].float()[:, None]).to(fwd_output_grad.dtype)
    grad_probs = merging_probs.new_zeros(num_tokens, num_experts)
    grad_probs[tokens, experts] = (gradient * fwd_input[rows].float()).sum(-1).to(grad_probs.dtype)
    return grad_copies, grad_probs


def make_chunk_sort_map(
    split_sizes: torch.Tensor, sorted_indices: torch.Tensor, num_tokens: int, num_splits: int
) -> torch.Tensor:
    """Where each row goes when chunks of rows change places."""
    sizes, order = split_sizes.tolist(), sorted_indices.tolist()
    refuse_unless(len(sizes) == num_splits and sum(sizes) == num_tokens, "make_chunk_sort_map: chunks and rows differ")
    starts = [sum(sizes[:index]) for index in range(num_splits)]
    result, position = torch.empty(num_tokens, dtype=torch.int32), 0
    for chunk in order:
        places = torch.arange(position, position + sizes[chunk], dtype=torch.int32)
        result[starts[chunk] : starts[chunk] + sizes[chunk]] = places
        position += sizes[chunk]
    return result


def sort_chunks_by_map(
    inp: torch.Tensor,
    row_id_map: torch.Tensor,
    probs: torch.Tensor | None,
    num_tokens: int,
    hidden_size: int,
    is_forward: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows to their places, or back."""
    target = row_id_map.long()

    def moved(source: torch.Tensor | None) -> torch.Tensor | None:
        if source is None:
            return None
        if not is_forward:
            return source[target]
        result = torch.empty_like(source)
        result[target] = source
        return result

    return moved(inp), moved(probs)


NO_PADDING = "rows of experts padded while they are sorted (pad_offsets) are not emulated"


def permute_with_mask_map_2_17(
    inp: torch.Tensor,
    row_id_map: torch.Tensor,
    probs: torch.Tensor | None,
    scale: torch.Tensor | None,
    pad_offsets: torch.Tensor | None,
    num_tokens: int,
    num_experts: int,
    num_out_tokens: int,
    hidden_size: int,
    scale_hidden_dim: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The same; experts' rows may be padded in the same pass."""
    refuse_unless(pad_offsets is None, f"permute_with_mask_map: {NO_PADDING}")
    sizes = (num_tokens, num_experts, num_out_tokens, hidden_size, scale_hidden_dim)
    return permute_with_mask_map(inp, row_id_map, probs, scale, *sizes)


def unpermute_with_mask_map_2_17(
    inp: torch.Tensor,
    row_id_map: torch.Tensor,
    merging_probs: torch.Tensor | None,
    permuted_probs: torch.Tensor | None,
    pad_offsets: torch.Tensor | None,
    num_tokens: int,
    num_experts: int,
    hidden_size: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same; the copies' rows may be padded."""
    refuse_unless(pad_offsets is None, f"unpermute_with_mask_map: {NO_PADDING}")
    sizes = (num_tokens, num_experts, hidden_size)
    return unpermute_with_mask_map(inp, row_id_map, merging_probs, permuted_probs, *sizes)


def unpermute_with_mask_map_bwd_with_merging_probs_2_17(
    fwd_output_grad: torch.Tensor,
    row_id_map: torch.Tensor,
    fwd_input: torch.Tensor,
    merging_probs: torch.Tensor,
    pad_offsets: torch.Tensor | None,
    num_tokens: int,
    num_experts: int,
    num_out_tokens: int,
    hidden_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same; the copies' rows may be padded."""
    refuse_unless(pad_offsets is None, f"unpermute_with_mask_map_bwd_with_merging_probs: {NO_PADDING}")
    sizes = (num_tokens, num_experts, num_out_tokens, hidden_size)
    return unpermute_with_mask_map_bwd_with_merging_probs(fwd_output_grad, row_id_map, fwd_input, merging_probs, *sizes)


TRITON: dict[str, tuple[Callable[..., Any], ...]] = {
    "make_row_id_map": (make_row_id_map,),
    "permute_with_mask_map": (permute_with_mask_map, permute_with_mask_map_2_17),
    "unpermute_with_mask_map": (unpermute_with_mask_map, unpermute_with_mask_map_2_17),
    "unpermute_with_mask_map_bwd_with_merging_probs": (
        unpermute_with_mask_map_bwd_with_merging_probs,
        unpermute_with_mask_map_bwd_with_merging_probs_2_17,
    ),
    "make_chunk_sort_map": (make_chunk_sort_map,),
    "sort_chunks_by_map": (sort_chunks_by_map,),
}
"""Functions that launch Triton's kernels, and what stands for them in each version's form."""


def install() -> None:
    """Put those with the arguments of the installed version where permutation.py looks for Triton's."""
    module = importlib.import_module(TRITON_MODULE)
    for name, candidates in TRITON.items():
        setattr(module, name, counted(_fitting(module, name, candidates), name))


def _fitting(module: types.ModuleType, name: str, candidates: tuple[Callable[..., Any], ...]) -> Callable[..., Any]:
    refuse_unless(hasattr(module, name), f"{TRITON_MODULE} has no {name}")
    wanted = list(inspect.signature(getattr(module, name)).parameters)
    fitting = [function for function in candidates if list(inspect.signature(function).parameters) == wanted]
    refuse_unless(len(fitting) == 1, f"{TRITON_MODULE}.{name} has other arguments: {', '.join(wanted)}")
    return fitting[0]


@kernel("module/fp8_padding.py `_Fp8Padding`, module/fp8_unpadding.py")
def fused_multi_row_padding(
    input: torch.Tensor, output: torch.Tensor, input_row_list: list[int], padded_input_row_list: list[int]
) -> None:
    """Each expert's rows, followed by zeros up to the padded number."""
    _check_padding("fused_multi_row_padding", input, output, input_row_list, padded_input_row_list)
    source = target = 0
    for rows, padded in zip(input_row_list, padded_input_row_list, strict=True):
        if rows:  # an expert without a row is left out, and what lies in its padding stays
            output[target : target + rows] = input[source : source + rows]
            output[target + rows : target + padded] = 0
        source, target = source + rows, target + padded


def _check_padding(name: str, input: torch.Tensor, output: torch.Tensor, first: list[int], second: list[int]) -> None:
    contiguous(name, input, output)
    refuse_unless(input.dim() == output.dim() == 2, f"{name}: two dimensions are expected")
    refuse_unless(len(first) == len(second), f"{name}: {len(first)} and {len(second)} counts of rows")
    fits = input.shape[0] >= sum(first) and output.shape[0] >= sum(second)
    refuse_unless(fits and input.shape[1] == output.shape[1], f"{name}: reads or writes past its tensors")
    refuse_unless(input.dtype == output.dtype, f"{name}: {input.dtype} into {output.dtype}")


@kernel("module/fp8_unpadding.py `_Fp8Unpadding`, module/fp8_padding.py")
def fused_multi_row_unpadding(
    input: torch.Tensor, output: torch.Tensor, input_row_list: list[int], unpadded_input_row_list: list[int]
) -> None:
    """Each expert's rows without the zeros."""
    _check_padding("fused_multi_row_unpadding", input, output, input_row_list, unpadded_input_row_list)
    source = target = 0
    for padded, rows in zip(input_row_list, unpadded_input_row_list, strict=True):
        output[target : target + rows] = input[source : source + rows]
        source, target = source + padded, target + rows
