"""Transformer Engine's own classes, imported on first use: they import the extension that the emulation stands for."""

import functools
import inspect
import types
from typing import Any, TypeAlias

import torch

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


@functools.cache
def arguments(function: Any) -> frozenset[str]:
    """Names of a function's arguments: what a constructor of this version of Transformer Engine takes."""
    return frozenset(inspect.signature(function).parameters)


def new_quantized(like: torch.Tensor, quantizer: Quantizer, tensor: type, storage: type, parts: dict) -> Quantized:
    """A quantised tensor, or its storage for a quantizer of internal tensors.

    Mirrors csrc/quantizer.cpp `create_tensor`: newer versions also say which device and wide format it stands for.
    """
    newer = "fake_dtype" in arguments(storage.__new__)
    if quantizer.internal:
        return storage(**parts, **({"fake_dtype": like.dtype} if newer else {}))
    place = {"device": like.device} if newer else {}
    return tensor(shape=like.shape, dtype=like.dtype, requires_grad=False, **parts, **place)
