"""Transformer Engine's own classes, imported on first use: they import the extension that the emulation stands for."""

import functools
import types
from typing import Any, TypeAlias

Quantizer: TypeAlias = Any
"""One of Transformer Engine's quantizers."""
Quantized: TypeAlias = Any
"""One of Transformer Engine's tensors in FP8."""


@functools.cache
def engine() -> types.SimpleNamespace:
    """Quantizers and quantised tensors by name."""
    from transformer_engine.pytorch.tensor import float8_blockwise_tensor, float8_tensor
    from transformer_engine.pytorch.tensor.storage import float8_blockwise_tensor_storage, float8_tensor_storage

    return types.SimpleNamespace(
        Float8Quantizer=float8_tensor.Float8Quantizer,
        Float8CurrentScalingQuantizer=float8_tensor.Float8CurrentScalingQuantizer,
        Float8Tensor=float8_tensor.Float8Tensor,
        Float8TensorStorage=float8_tensor_storage.Float8TensorStorage,
        Float8BlockQuantizer=float8_blockwise_tensor.Float8BlockQuantizer,
        Float8BlockwiseQTensor=float8_blockwise_tensor.Float8BlockwiseQTensor,
        Float8BlockwiseQTensorStorage=float8_blockwise_tensor_storage.Float8BlockwiseQTensorStorage,
    )
