"""Whether weights are numbers at all."""

import torch

PIECE = 1 << 22
"""Values that are looked at together."""


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value of a tensor, of any shape and dtype, is NaN or infinite; integers always are finite.

    One pass without a copy: a sum is finite only where all it adds are. It is taken in the tensor's own dtype (inside
    torch adds up in fp32), since for another one torch first copies the whole tensor. Where finite values overflow it,
    each is looked at, in pieces.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize > 1 and bool(torch.isfinite(tensor.sum())):
        return True
    pieces = tensor.reshape(-1).split(PIECE)
    return all(bool(torch.isfinite(piece.float() if piece.dtype.itemsize == 1 else piece).all()) for piece in pieces)
