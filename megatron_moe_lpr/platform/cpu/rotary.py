"""The rotary embedding in few passes, with sines and cosines computed once instead of in every layer and call."""

import functools
from typing import Any

import megatron.core.transformer.attention as megatron_attention
import torch

from megatron_moe_lpr.megatron.overriding import replace


class Rotation(torch.autograd.Function):
    """Rotate the pairs (i, i + half) of the last dimension; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        """[sequence, batch, heads, dimension] with [sequence, 1, 1, dimension / 2] each."""
        ctx.save_for_backward(cosines, sines)
        return rotate(states, cosines, sines)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Of the states only: frequencies are constants."""
        cosines, sines = ctx.saved_tensors
        return rotate(gradient, cosines, -sines), None, None


def rotate(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """(a, b) to (a cos - b sin, b cos + a sin)."""
    first, second = states.chunk(2, dim=-1)
    output = torch.empty(states.shape, dtype=states.dtype)
    of_first, of_second = output.chunk(2, dim=-1)
    torch.mul(first, cosines, out=of_first).addcmul_(second, sines, value=-1)
    torch.mul(second, cosines, out=of_second).addcmul_(first, sines)
    return output


def angles(frequencies: torch.Tensor, scale: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the first half, which the second repeats; kept on the tensor that RotaryEmbedding caches."""
    kept = vars(frequencies).setdefault("_angles", {})
    if (scale, dtype) not in kept:
        half = frequencies[..., : frequencies.shape[-1] // 2]
        kept[scale, dtype] = ((half.cos() * scale).to(dtype), (half.sin() * scale).to(dtype))
    return kept[scale, dtype]


def install() -> None:
    """attention.py `apply_rotary_pos_emb`, for sequences of equal length whose heads are rotated whole."""
    original = megatron_attention.apply_rotary_pos_emb

    @functools.wraps(original)
    def apply(
        states: torch.Tensor,
        frequencies: torch.Tensor,
        config: Any,
        cu_seqlens: torch.Tensor | None = None,
        mscale: float = 1.0,
        cp_group: Any = None,
        **options: Any,
    ) -> torch.Tensor:
        partial = frequencies.shape[-1] != states.shape[-1]
        if cu_seqlens is not None or partial or config.rotary_interleaved or config.multi_latent_attention:
            return original(states, frequencies, config, cu_seqlens, mscale, cp_group, **options)
        return Rotation.apply(states, *angles(frequencies, mscale, states.dtype))

    replace(megatron_attention, apply_rotary_pos_emb=apply)
