"""Fused attention, the softmax kernels and rotary embedding against float64 and its autograd."""

import pytest
import torch

from tests.emulation.builders import call
from tests.emulation.kernels import KernelRefuses
from tests.emulation.names import (
    DType,
    NVTE_Bias_Type,
    NVTE_Fused_Attn_Backend,
    NVTE_Mask_Type,
    NVTE_QKV_Format,
    NVTE_QKV_Layout,
    NVTE_Softmax_Type,
)
from tests.emulation.table import TABLE

SEQUENCE, BATCH, HEADS, GROUPS, DIM, SCALE = 16, 2, 4, 2, 8, 0.3
CAUSAL, SEPARATE = NVTE_Mask_Type.NVTE_CAUSAL_MASK, NVTE_QKV_Layout.NVTE_SBHD_SBHD_SBHD
KIND = {"bias_type": NVTE_Bias_Type.NVTE_NO_BIAS, "softmax_type": NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX}
LENGTHS = torch.arange(BATCH + 1) * SEQUENCE
FORMATS = NVTE_QKV_Format.__members__
NO_FORMAT = FORMATS.get("NVTE_QKV_Format_NOT_SET")
# Arguments that 2.11 lacks.
NEWER = {"o_format": FORMATS["NVTE_SBHD"], "qkv_scale_inv_format": NO_FORMAT, "bottom_right_diagonal": False}
ROUNDED = {"rtol": 2**-7, "atol": 2e-3}  # bf16


def inputs(dtype=torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values and the output's gradient, [sequence, batch, heads, dim]."""
    shapes = (HEADS, GROUPS, GROUPS, HEADS)
    return tuple(torch.randn(SEQUENCE, BATCH, heads, DIM, dtype=dtype) for heads in shapes)


def attention(queries, keys, values, window=-1, causal=True) -> torch.Tensor:
    """By its definition, a head at a time; differentiable. Fewer queries than keys are the last positions."""
    distance = torch.arange(len(keys))[-len(queries) :, None] - torch.arange(len(keys))
    keep = (distance >= 0) & ((distance <= window) | (window < 0)) if causal else distance == distance
    outputs = []
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        scores = torch.einsum("sbd,tbd->bst", queries[:, :, head], keys[:, :, group]) * SCALE
        weights = torch.softmax(scores.masked_fill(~keep, float("-inf")), -1)
        outputs.append(torch.einsum("bst,tbd->sbd", weights, values[:, :, group]))
    return torch.stack(outputs, 2)


def forward(tex, tensors, **changes) -> list[torch.Tensor]:
    fields = KIND | {"max_seqlen_q": SEQUENCE, "max_seqlen_kv": SEQUENCE, "is_training": True, "attn_scale": SCALE}
    fields |= {"p_dropout": 0.0, "set_zero": True, "qkv_layout": SEPARATE, "attn_mask_type": CAUSAL}
    fields |= {"window_size": (-1, 0), "cu_seqlens_q": LENGTHS, "cu_seqlens_kv": LENGTHS, "fake_dtype": torch.bfloat16}
    fields |= dict.fromkeys(("cu_seqlens_q_padded", "cu_seqlens_kv_padded", "page_table_k", "page_table_v"))
    fields |= dict.fromkeys(("s_quantizer", "o_quantizer", "Bias", "SoftmaxOffset", "rng_gen"))
    fields |= {"rng_elts_per_thread": 1, "return_max_logit": False, "cuda_graph": False}
    return call("fused_attn_fwd", **(NEWER | fields | dict(zip("QKV", tensors, strict=True)) | changes))


def backward(tex, tensors, output, gradient, saved, **changes) -> list[torch.Tensor]:
    fields = KIND | {"max_seqlen_q": SEQUENCE, "max_seqlen_kv": SEQUENCE, "attn_scale": SCALE, "p_dropout": 0.0}
    fields |= {"set_zero": True, "qkv_layout": SEPARATE, "attn_mask_type": CAUSAL, "window_size": (-1, 0)}
    fields |= {"deterministic": False, "cu_seqlens_q": LENGTHS, "cu_seqlens_kv": LENGTHS, "O": output, "dO": gradient}
    fields |= {"fake_dtype": torch.bfloat16, "dqkv_type": DType.kBFloat16, "Aux_CTX_Tensors": saved}
    fields |= dict.fromkeys(("cu_seqlens_q_padded", "cu_seqlens_kv_padded"))
    fields |= dict.fromkeys(("s_quantizer", "dp_quantizer", "dqkv_quantizer")) | {"cuda_graph": False}
    newer = NEWER | {"do_format": NEWER["o_format"], "do_scale_inv_format": NO_FORMAT}
    fields |= newer | {"dqkv_layout": changes.get("qkv_layout", SEPARATE)}
    return call("fused_attn_bwd", **(fields | dict(zip("QKV", tensors, strict=True)) | changes))


@pytest.mark.parametrize("window", [-1, 4])
def test_fused_attention_and_its_gradients(window, tex):
    """Grouped heads, causal, with and without a sliding window."""
    *tensors, gradient = inputs()
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    expected = attention(*exact, window=window)
    expected.backward(gradient.double())
    output, *saved = forward(tex, tensors, window_size=(window, 0))
    torch.testing.assert_close(output.double(), expected.detach(), **ROUNDED)
    found = backward(tex, tensors, output, gradient, saved, window_size=(window, 0))
    assert found[3:] == [None, None]
    for part, tensor in zip(found, exact, strict=False):
        assert part.is_contiguous() and part.dtype == torch.bfloat16
        error = (part.double() - tensor.grad).norm() / tensor.grad.norm()
        assert error < 2**-7


@pytest.mark.parametrize(("window", "mask"), [(-1, "NO"), (-1, "CAUSAL_BOTTOM_RIGHT"), (5, "CAUSAL_BOTTOM_RIGHT")])
def test_parts_of_a_sequence_as_context_parallelism_computes_them(window, mask, tex):
    """The second half of the queries with all keys, or as the last positions."""
    *tensors, gradient = inputs()
    tensors[0], gradient, causal = tensors[0][SEQUENCE // 2 :], gradient[SEQUENCE // 2 :], mask != "NO"
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    expected = attention(*exact, window=window, causal=causal)
    expected.backward(gradient.double())
    call = {"attn_mask_type": NVTE_Mask_Type[f"NVTE_{mask}_MASK"], "window_size": (window, 0 if causal else -1)}
    output, *saved = forward(tex, tensors, **call)
    torch.testing.assert_close(output.double(), expected.detach(), **ROUNDED)
    for part, tensor in zip(backward(tex, tensors, output, gradient, saved, **call), exact, strict=False):
        assert (part.double() - tensor.grad).norm() / tensor.grad.norm() < 2**-7


def test_what_backward_gets_is_the_logarithm_of_the_sums(tex):
    *tensors, _ = inputs()
    scores = torch.einsum("sbd,tbd->bst", tensors[0][:, :, 3].double(), tensors[1][:, :, 1].double()) * SCALE
    expected = [scores[0, row, : row + 1].exp().sum().log() for row in range(SEQUENCE)]
    statistics = forward(tex, tensors)[1]
    assert statistics.shape == (BATCH, HEADS, SEQUENCE, 1) and statistics.dtype == torch.float32
    torch.testing.assert_close(statistics[0, 3, :, 0].double(), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_mask_type": NVTE_Mask_Type.NVTE_NO_MASK}, "fused attention: mask"),
        ({"K": torch.randn(8, BATCH, GROUPS, DIM).bfloat16()}, "fused attention: mask .* of 16 queries and 8 keys"),
        ({"p_dropout": 0.1}, "dropout is not emulated"),
        ({"qkv_layout": NVTE_QKV_Layout.NVTE_BSHD_BSHD_BSHD}, "layout .* is not emulated"),
        ({"Bias": torch.zeros(1)}, "paging, FP8, bias and the largest logit are not"),
        ({"Q": torch.randn(SEQUENCE, BATCH, HEADS, DIM)}, r"fused attention in torch\.float32"),
        ({"Q": torch.randn(SEQUENCE, BATCH, DIM, HEADS).bfloat16().transpose(2, 3)}, "do not lie side by side"),
        ({"Q": torch.randn(BATCH, SEQUENCE, HEADS, DIM).bfloat16().transpose(0, 1)}, "not contiguous"),
    ],
)
def test_refusals_of_fused_attention(changes, message, tex):
    *tensors, gradient = inputs()
    with pytest.raises(KernelRefuses, match=message):
        forward(tex, tensors, **changes)
    if "Bias" not in changes:
        output, *saved = forward(tex, tensors)
        with pytest.raises(KernelRefuses, match=message):
            backward(tex, tensors, output, gradient, saved, **changes)
    with pytest.raises(KernelRefuses, match="FP8 attention is not emulated"):
        backward(tex, tensors, gradient, gradient, [], dqkv_quantizer=object())


@pytest.mark.parametrize(
    ("changes", "fused"),
    [
        ({}, True),
        ({"q_dtype": DType.kFloat32, "kv_dtype": DType.kFloat32}, False),
        ({"head_dim_qk": 12, "head_dim_v": 12}, False),
        ({"head_dim_qk": 264, "head_dim_v": 264}, False),
        ({"num_gqa_groups": 3}, False),
        ({"attn_mask_type": NVTE_Mask_Type.NVTE_PADDING_MASK}, False),
        ({"window_size_left": 128}, True),
    ],
)
def test_the_kernel_is_chosen_by_shape(changes, fused, tex):
    """fp32 goes to the unfused path; heads come in eights up to 256."""
    check_choice(changes, fused)


def check_choice(changes, fused):
    fields = KIND | {"is_training": True, "q_dtype": DType.kBFloat16, "kv_dtype": DType.kBFloat16, "p_dropout": 0.0}
    fields |= {"qkv_layout": SEPARATE, "attn_mask_type": CAUSAL, "num_attn_heads": HEADS, "num_gqa_groups": GROUPS}
    fields |= {"max_seqlen_q": 512, "max_seqlen_kv": 512, "head_dim_qk": 64, "head_dim_v": 64}
    fields |= {"window_size_left": -1, "window_size_right": 0, "return_max_logit": False, "cuda_graph": False}
    backends = NVTE_Fused_Attn_Backend
    expected = backends.NVTE_F16_arbitrary_seqlen if fused else backends.NVTE_No_Backend
    found = chosen(fields | {"deterministic": False} | changes)
    assert found == expected


def chosen(fields) -> object:
    """The kernel that each version's form of the question gets; newer ones get the reason for none too."""
    if not TABLE.at_least("2.20"):
        return call("get_fused_attn_backend", **fields)
    found, reason = call("get_fused_attn_backend", fused_attn_params=description(**fields))
    assert bool(reason) == (found == NVTE_Fused_Attn_Backend.NVTE_No_Backend)
    return found


def description(q_dtype, kv_dtype, p_dropout, **fields):
    from transformer_engine.pytorch.attention.dot_product_attention.utils import FusedAttentionParams

    form = FORMATS["NVTE_THD" if "THD" in fields["qkv_layout"].name else "NVTE_SBHD"]
    formats = {"o_format": form, "do_format": form, "dqkv_layout": fields["qkv_layout"]}
    return FusedAttentionParams(**(formats | {"qkv_dtype": q_dtype, "dropout": p_dropout} | fields))


@pytest.mark.skipif(not TABLE.at_least("2.17"), reason="2.11 has these formats only")
def test_refusals_of_newer_arguments(tex):
    *tensors, gradient = inputs()
    output, *saved = forward(tex, tensors)
    other, scales = FORMATS["NVTE_BSHD"], FORMATS["NVTE_BHSD"]
    for way in (lambda **given: forward(tex, tensors, **given), backward_of(tex, tensors, output, gradient, saved)):
        with pytest.raises(KernelRefuses, match=r"format .* is not emulated"):
            way(o_format=other)
        with pytest.raises(KernelRefuses, match="scales of FP8 numbers"):
            way(qkv_scale_inv_format=scales)
    with pytest.raises(KernelRefuses, match=r"format .* is not emulated"):
        backward(tex, tensors, output, gradient, saved, do_format=other)
    with pytest.raises(KernelRefuses, match="gradients in the layout"):
        backward(tex, tensors, output, gradient, saved, dqkv_layout=NVTE_QKV_Layout.NVTE_SB3HD)


def backward_of(tex, *given):
    return lambda **changes: backward(tex, *given, **changes)


@pytest.mark.skipif(not TABLE.at_least("2.20"), reason="older versions are asked by arguments")
def test_a_description_with_a_wrong_type_is_refused():
    fields = {"q_dtype": DType.kBFloat16, "kv_dtype": DType.kBFloat16, "p_dropout": 0.0, "qkv_layout": SEPARATE}
    with pytest.raises(TypeError, match="get_fused_attn_backend: head_dim_qk is int, not float"):
        call("get_fused_attn_backend", fused_attn_params=description(**fields, head_dim_qk=64.0))


MASK = torch.rand(1, 1, 8, 16, generator=torch.Generator().manual_seed(1)) < 0.4
SOFTMAX = {
    "scaled_softmax": ((2, 3, 8, 16), torch.zeros(8, 16, dtype=torch.bool), ()),
    "scaled_masked_softmax": ((2, 3, 8, 16), MASK[0, 0], (MASK,)),
    "scaled_upper_triang_masked_softmax": ((6, 8, 8), torch.ones(8, 8, dtype=torch.bool).triu(1), ()),
    "scaled_aligned_causal_masked_softmax": ((2, 3, 8, 16), torch.ones(8, 16, dtype=torch.bool).triu(9), ()),
}


@pytest.mark.parametrize("name", SOFTMAX)
def test_softmax_and_its_gradient(name, tex):
    shape, hidden, mask = SOFTMAX[name]
    scores, gradient = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    exact = scores.double().requires_grad_()
    expected = torch.softmax((exact * SCALE).masked_fill(hidden, float("-inf")), -1)
    expected.backward(gradient.double())
    found = getattr(tex, f"{name}_forward")(scores, *mask, SCALE)
    torch.testing.assert_close(found.double(), expected.detach(), **ROUNDED)
    grad_scores = getattr(tex, f"{name}_backward")(gradient, found, SCALE)
    assert grad_scores.dtype == torch.bfloat16
    torch.testing.assert_close(grad_scores.double(), exact.grad, rtol=2**-6, atol=4e-3)


@pytest.mark.parametrize("name", SOFTMAX)
def test_refusals_of_softmax(name, tex):
    shape, _, mask = SOFTMAX[name]
    scores = torch.randn(shape).bfloat16()
    forward, backward = (getattr(tex, f"{name}_{way}") for way in ("forward", "backward"))
    for change, message in (
        (scores.float(), r"in torch\.float32"),
        (scores.transpose(-1, -2).contiguous().transpose(-1, -2), "not contiguous"),
        (scores[0].contiguous(), "dimensions"),
        *([(scores[..., :12].contiguous(), "12 keys, not a multiple of 8")] if scores.dim() == 4 else []),
    ):
        with pytest.raises(KernelRefuses, match=message):
            forward(change, *mask, SCALE)
        with pytest.raises(KernelRefuses, match=message):
            backward(change, change, SCALE)
    if mask:
        with pytest.raises(KernelRefuses, match="a mask"):
            forward(scores, mask[0][..., :8], SCALE)


def angles(width: int) -> torch.Tensor:
    """[positions, 1, 1, width], both halves alike."""
    frequency = 100.0 ** (-torch.arange(width // 2) / (width // 2))
    half = torch.arange(SEQUENCE + 3)[:, None] * frequency
    return torch.cat((half, half), -1)[:, None, None]


def rotated(tensor: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Pairs of numbers as complex ones, turned by their angle; the numbers past the width stay."""
    width = freqs.shape[-1]
    turned, rest = tensor.double()[..., :width], tensor.double()[..., width:]
    pairs = torch.complex(*turned.chunk(2, -1)) * torch.exp(1j * freqs[: tensor.shape[0], ..., : width // 2].double())
    return torch.cat((pairs.real, pairs.imag, rest), -1)


@pytest.mark.parametrize("width", [DIM, DIM // 2])
@pytest.mark.parametrize("layout", [NVTE_QKV_Format.NVTE_SBHD, NVTE_QKV_Format.NVTE_BSHD])
def test_rotary_embedding_and_back(width, layout, tex):
    """Any strides; backward turns the other way."""
    tensor, freqs = torch.randn(SEQUENCE, BATCH, HEADS, DIM), angles(width)
    expected, given = rotated(tensor, freqs), tensor
    if layout == NVTE_QKV_Format.NVTE_BSHD:
        given, expected = tensor.transpose(0, 1), expected.transpose(0, 1)
    arguments = (freqs, None, layout, False, None, 1, 0)
    found = tex.fused_rope_forward(given, *arguments)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tex.fused_rope_backward(found, *arguments), given, rtol=1e-5, atol=1e-5)


def test_refusals_of_rotary_embedding(tex):
    tensor, freqs, layout = torch.randn(SEQUENCE, BATCH, HEADS, DIM), angles(DIM), NVTE_QKV_Format.NVTE_SBHD
    for arguments, message in (
        ((tensor, freqs, None, layout, True, None, 1, 0), "interleaved halves are not emulated"),
        ((tensor, freqs, None, layout, False, None, 2, 0), "context parallelism are not emulated"),
        ((tensor, freqs.double(), None, layout, False, None, 1, 0), r"frequencies in torch\.float64"),
        ((tensor, freqs[:4], None, layout, False, None, 1, 0), "4 positions for 16 tokens"),
        ((tensor, freqs[:, 0], None, layout, False, None, 1, 0), "frequencies"),
        ((tensor[0], freqs, None, layout, False, None, 1, 0), "3 dimensions"),
        ((tensor[..., :4], freqs, None, layout, False, None, 1, 0), "more frequencies than a head has numbers"),
    ):
        with pytest.raises(KernelRefuses, match=message):
            tex.fused_rope_forward(*arguments)
        if "context" not in message:
            with pytest.raises(KernelRefuses, match=message):
                tex.fused_rope_backward(*arguments)
