"""Whether a tensor is finite."""

import torch

CHUNK = 1 << 22
"""Values that are checked at once where the sum does not decide."""


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite, for any shape and dtype; integers always are finite.

    One pass without a copy: a sum is finite only if all summands are. It is computed in the tensor's own dtype, since
    for another one torch first copies the whole tensor. Where finite values overflow the sum, each value is checked,
    chunk by chunk.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize > 1 and bool(torch.isfinite(tensor.sum())):
        return True
    chunks = tensor.reshape(-1).split(CHUNK)
    return all(bool(torch.isfinite(chunk.float() if chunk.dtype.itemsize == 1 else chunk).all()) for chunk in chunks)
