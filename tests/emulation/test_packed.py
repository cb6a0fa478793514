"""Packed sequences (thd): attention, rotary embedding and conversions against each sequence alone."""

import pytest
import torch

from tests.emulation.kernels import KernelRefuses
from tests.emulation.names import NVTE_Mask_Type, NVTE_QKV_Format, NVTE_QKV_Layout
from tests.emulation.test_attention import (
    DIM,
    FORMATS,
    GROUPS,
    HEADS,
    ROUNDED,
    SCALE,
    angles,
    backward,
    check_choice,
    forward,
    rotated,
)

LENGTHS = (5, 1, 7, 3)
TOKENS = sum(LENGTHS)
BOUNDS = torch.tensor([0, 5, 6, 13, 16], dtype=torch.int32)
LAYOUT, CAUSAL = NVTE_QKV_Layout.NVTE_THD_THD_THD, NVTE_Mask_Type.NVTE_PADDING_CAUSAL_MASK
PACKED = {"qkv_layout": LAYOUT, "attn_mask_type": CAUSAL, "o_format": FORMATS["NVTE_THD"]}
PACKED |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"), BOUNDS)


def inputs() -> tuple[torch.Tensor, ...]:
    """Queries, keys, values and the output's gradient, [tokens, heads, dim]."""
    return tuple(torch.randn(TOKENS, heads, DIM).bfloat16() for heads in (HEADS, GROUPS, GROUPS, HEADS))


def attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int) -> torch.Tensor:
    """By its definition, a sequence and a head at a time; differentiable."""
    outputs = []
    for q, k, v in zip(*(tensor.split(LENGTHS) for tensor in (queries, keys, values)), strict=True):
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        hidden = (distance < 0) | ((distance > window) & (window >= 0))
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            scores = (q[:, head] @ k[:, group].T * SCALE).masked_fill(hidden, float("-inf"))
            heads.append(scores.softmax(-1) @ v[:, group])
        outputs.append(torch.stack(heads, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [-1, 2])
def test_attention_within_each_sequence_and_its_gradients(window, tex):
    *tensors, gradient = inputs()
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    expected = attention(*exact, window)
    expected.backward(gradient.double())
    packed = PACKED | {"window_size": (window, 0)}
    output, *saved = forward(tex, tensors, **packed)
    torch.testing.assert_close(output.double(), expected.detach(), **ROUNDED)
    found = backward(tex, tensors, output, gradient, saved, **packed, do_format=FORMATS["NVTE_THD"])
    for part, tensor in zip(found, exact, strict=False):
        assert (part.double() - tensor.grad).norm() / tensor.grad.norm() < 2**-7


def test_tokens_after_the_last_sequence_are_left_alone(tex):
    *tensors, _ = inputs()
    short = BOUNDS[:-1]
    fields = {name: short if value is BOUNDS else value for name, value in PACKED.items()}
    output = forward(tex, tensors, **fields)[0]
    assert torch.equal(output[:13], forward(tex, tensors, **PACKED)[0][:13]) and not output[13:].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens_q": BOUNDS.long()}, "padding between|cu_seqlens torch.int64"),
        ({"cu_seqlens_q_padded": None}, "which hold the offsets, are missing"),
        ({"cu_seqlens_kv_padded": BOUNDS + 1}, "padding between sequences is not emulated"),
        ({"cu_seqlens_kv": BOUNDS[:-1], "cu_seqlens_kv_padded": BOUNDS}, "other lengths of keys"),
        ({"max_seqlen_q": 6, "max_seqlen_kv": 6}, "a sequence is longer than 6"),
        ({"max_seqlen_q": 8}, "another greatest length of keys"),
        ({"attn_mask_type": NVTE_Mask_Type.NVTE_CAUSAL_MASK}, "fused attention: mask"),
        ({"attn_mask_type": NVTE_Mask_Type.NVTE_PADDING_MASK}, "fused attention: mask"),
        ({"Q": torch.randn(HEADS, TOKENS, DIM).bfloat16().transpose(0, 1)}, "not contiguous"),
    ],
)
def test_refusals(changes, message, tex):
    *tensors, _ = inputs()
    with pytest.raises(KernelRefuses, match=message):
        forward(tex, tensors, **(PACKED | changes))


@pytest.mark.parametrize("fused", [True, False])
def test_the_kernel_is_chosen_by_layout_and_mask_together(fused, tex):
    check_choice({"qkv_layout": LAYOUT} | ({"attn_mask_type": CAUSAL} if fused else {}), fused)


def test_rotary_embedding_counts_in_each_sequence(tex):
    tensor, freqs, layout = torch.randn(TOKENS, HEADS, DIM), angles(DIM), NVTE_QKV_Format.NVTE_THD
    expected = torch.cat([rotated(part[:, None], freqs)[:, 0] for part in tensor.split(LENGTHS)])
    found = tex.fused_rope_forward(tensor, freqs, None, layout, False, BOUNDS, 1, 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    back = tex.fused_rope_backward(found, freqs, None, layout, False, BOUNDS, 1, 0)
    torch.testing.assert_close(back, tensor, rtol=1e-5, atol=1e-5)
    for bounds, angle, message in (
        (None, freqs, "no cu_seqlens"),
        (BOUNDS, freqs[:6], "a sequence is longer than 6"),
        (BOUNDS[:-1], freqs, "tokens after the last sequence"),
    ):
        with pytest.raises(KernelRefuses, match=message):
            tex.fused_rope_forward(tensor, angle, None, layout, False, bounds, 1, 0)


def test_to_sequences_of_one_length_and_back(tex):
    tensor = torch.randn(TOKENS, HEADS, DIM)
    padded = tex.convert_thd_to_bshd(tensor, BOUNDS, len(LENGTHS), 9)
    assert padded.shape == (4, 9, HEADS, DIM)
    for row, part in zip(padded, tensor.split(LENGTHS), strict=True):
        assert torch.equal(row[: len(part)], part) and not row[len(part) :].any()
    assert torch.equal(tex.convert_bshd_to_thd(padded, BOUNDS, BOUNDS[-1]), tensor)
    with pytest.raises(KernelRefuses, match="a sequence is longer than 6"):
        tex.convert_thd_to_bshd(tensor, BOUNDS, len(LENGTHS), 6)
