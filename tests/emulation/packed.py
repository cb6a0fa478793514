"""Sequences of different lengths one after the other (thd), as Transformer Engine's kernels find them."""

import itertools

import torch

from tests.emulation.kernels import contiguous, kernel, refuse_unless


def sequences(name: str, cu_seqlens: torch.Tensor | None, tokens: int, longest: int) -> list[slice]:
    """The place of each sequence among the tokens.

    A token past the end of the last sequence is in none, and kernels leave it alone. A sequence longer than the length
    that a kernel is told would lose its end.

    Args:
        tokens: number of tokens.
        longest: the greatest length that the kernel is told.
    """
    refuse_unless(cu_seqlens is not None, f"{name}: no cu_seqlens")
    refuse_unless(cu_seqlens.dtype == torch.int32 and cu_seqlens.dim() == 1, f"{name}: cu_seqlens {cu_seqlens.dtype}")
    bounds = cu_seqlens.detach().numpy().tolist()
    refuse_unless(bounds == sorted(bounds) and bounds[0] >= 0 and bounds[-1] <= tokens, f"{name}: cu_seqlens {bounds}")
    found = [slice(start, end) for start, end in itertools.pairwise(bounds)]
    refuse_unless(all(one.stop - one.start <= longest for one in found), f"{name}: a sequence is longer than {longest}")
    return found


@kernel("attention/dot_product_attention/utils.py ConvertTHDtoBSHD")
def convert_thd_to_bshd(tensor: torch.Tensor, cu_seqlens: torch.Tensor, b: int, max_seq_len: int) -> torch.Tensor:
    """[tokens, heads, dim] as [sequences, longest, heads, dim], with zeros behind the shorter ones."""
    contiguous("convert_thd_to_bshd", tensor)
    padded = torch.zeros(b, max_seq_len, *tensor.shape[1:], dtype=tensor.dtype)
    places = sequences("convert_thd_to_bshd", cu_seqlens, len(tensor), max_seq_len)
    for row, place in zip(padded, places, strict=True):
        row[: place.stop - place.start] = tensor[place]
    return padded


@kernel("attention/dot_product_attention/utils.py ConvertBSHDtoTHD")
def convert_bshd_to_thd(tensor: torch.Tensor, cu_seqlens: torch.Tensor, t: int) -> torch.Tensor:
    """And back."""
    contiguous("convert_bshd_to_thd", tensor)
    packed = torch.zeros(int(t), *tensor.shape[2:], dtype=tensor.dtype)
    for row, place in zip(tensor, sequences("convert_bshd_to_thd", cu_seqlens, int(t), tensor.shape[1]), strict=True):
        packed[place] = row[: place.stop - place.start]
    return packed
