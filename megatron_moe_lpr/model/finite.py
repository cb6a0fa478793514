"""Whether weights are numbers at all."""

import torch


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value of a tensor, of any shape and dtype, is NaN or infinite; integers always are finite.

    One pass without a copy: a sum is finite only where all it adds are. Where finite values overflow it, each is
    looked at.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        return bool(torch.isfinite(tensor.float()).all())
    total = tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())
