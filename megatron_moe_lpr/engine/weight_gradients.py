"""Weight gradients that Transformer Engine's products add to the gradient buffer themselves (`main_grad`).

Otherwise each product writes its gradient in the format of the weights, and Megatron's hook adds that to the fp32
buffer: one more pass over every trained matrix in each micro-batch, and one more rounding.

A product that has added sets `grad_added_to_main_grad` and gives autograd a tensor without values, so that Megatron's
hook and the first step's check of gradients run as usual, and the hook adds nothing. Under FP8 the first micro-batch of
a step overwrites the buffer instead, which is zero then (`DistributedDataParallel.zero_grad_buffer`). An expert without
a token adds nothing, or overwrites with zeros.
"""

from collections.abc import Iterable

import torch

from megatron_moe_lpr.model.configuration.config import MoELPRConfig

SWITCH = "fuse_wgrad_accumulation"
"""Attribute of Transformer Engine's linear layers that their forward pass reads (linear.py, layernorm_linear.py,
grouped_linear.py)."""


def may_fuse(config: MoELPRConfig) -> bool:
    """Whether layers may add at all: asked for, and no activations are offloaded to the host.

    Offloading saves tensors for the backward pass through hooks of torch, which hand parameters back as plain tensors.
    Transformer Engine then finds no `grad_added_to_main_grad`, and autograd gets no gradient (linear.py).
    """
    return config.fuse_wgrad_accumulation and not config.fine_grained_activation_offloading


def fuse_weight_gradients(chunks: Iterable[torch.nn.Module], enabled: bool) -> int:
    """Let each of Transformer Engine's linear layers add its weight gradients to `main_grad`, or not.

    Call it when parameters are frozen and have their gradient buffers. A layer adds only if all its matrices train: a
    grouped layer decides by its first matrix whether any trains, and then reads `main_grad` of all, which a frozen one
    lacks (grouped_linear.py). Megatron's own layers are left as they are; their products need NVIDIA apex
    (tensor_parallel/layers.py `fused_weight_gradient_mlp_cuda`).

    Returns:
        The number of layers that add.
    """
    added = 0
    for layer in (module for chunk in chunks for module in chunk.modules() if hasattr(module, SWITCH)):
        matrices = [weight for weight in layer.parameters(recurse=False) if weight.dim() == 2]
        trains = enabled and bool(matrices) and all(weight.requires_grad for weight in matrices)
        setattr(layer, SWITCH, trains)
        added += trains
    return added
