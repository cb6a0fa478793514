"""The fused router against softmax, top-k and their autograd in float64."""

import pytest
import torch

from tests.emulation.builders import call
from tests.emulation.kernels import KernelRefuses
from tests.emulation.table import TABLE

TOKENS, EXPERTS, TOP_K = 9, 5, 2


def forward(tex, logits, **changes):
    fields = {"topk": TOP_K, "use_pre_softmax": False, "num_groups": None, "group_topk": None, "scaling_factor": None}
    fields |= {"logits": logits, "score_function": "softmax", "expert_bias": None}
    return call("fused_topk_with_score_function_fwd", **(fields | changes))


def backward(tex, choices, kept, gradient, **changes) -> torch.Tensor:
    """The gradient of the logits, which newer versions write into a tensor."""
    target = torch.empty_like(gradient)
    fields = {"routing_map": choices, "intermediate_output": kept, "grad_probs": gradient, "topk": TOP_K}
    fields |= {"num_tokens": TOKENS, "num_experts": EXPERTS, "grad_logits": target, "use_pre_softmax": False}
    fields |= {"scaling_factor": None, "score_function": "softmax"}
    result = call("fused_topk_with_score_function_bwd", **(fields | changes))
    return target if TABLE.at_least("2.17") else result


def defined(logits: torch.Tensor, before: bool, factor: float) -> torch.Tensor:
    """Weights: softmax over all and then the largest, or over the largest alone."""
    chosen = torch.topk(logits, TOP_K).indices
    scores = torch.softmax(logits, -1).gather(1, chosen) if before else torch.softmax(logits.gather(1, chosen), -1)
    return torch.zeros_like(logits).scatter(1, chosen, scores * factor)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("factor", [None, 2.5])
def test_weights_choices_and_gradients(before, factor, tex):
    logits, gradient = torch.randn(TOKENS, EXPERTS), torch.randn(TOKENS, EXPERTS)
    exact = logits.double().requires_grad_()
    expected = defined(exact, before, factor or 1.0)
    expected.backward(gradient.double())
    weights, choices, kept = forward(tex, logits, use_pre_softmax=before, scaling_factor=factor)
    torch.testing.assert_close(weights.double(), expected.detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(choices, expected > 0)
    found = backward(tex, choices, kept, gradient, use_pre_softmax=before, scaling_factor=factor)
    torch.testing.assert_close(found.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_equal_logits_choose_two_experts(tex):
    weights, choices, _ = forward(tex, torch.zeros(TOKENS, EXPERTS))
    assert (choices.sum(1) == TOP_K).all()
    assert torch.equal(weights[choices], torch.full((TOKENS * TOP_K,), 0.5))


def test_results_have_the_logits_format(tex):
    weights, _, kept = forward(tex, torch.randn(TOKENS, EXPERTS).bfloat16())
    assert weights.dtype == torch.bfloat16
    assert kept.dtype == (torch.float32 if TABLE.at_least("2.17") else torch.bfloat16)


@pytest.mark.skipif(not TABLE.at_least("2.17"), reason="2.11 takes [tokens, experts] only")
def test_leading_dimensions_stay(tex):
    logits, gradient = torch.randn(2, TOKENS, 2, EXPERTS)
    weights, choices, kept = forward(tex, logits)
    flat = forward(tex, logits.flatten(0, 1))
    assert all(
        torch.equal(part.flatten(0, 1), other) for part, other in zip((weights, choices, kept), flat, strict=True)
    )
    found = backward(tex, choices, kept, gradient)
    assert torch.equal(found.flatten(0, 1), backward(tex, flat[1], flat[2], gradient.flatten(0, 1)))


@pytest.mark.skipif(not TABLE.at_least("2.17"), reason="2.11 has no such arguments")
def test_refusals_of_newer_arguments(tex):
    logits = torch.randn(TOKENS, EXPERTS)
    _, choices, kept = forward(tex, logits)
    for changes, message in (
        ({"routing_map_format": 1}, "choices as bits are not emulated"),
        *([({"topk_indices": torch.zeros(TOKENS, TOP_K)}, "choices as indices")] if TABLE.at_least("2.20") else []),
    ):
        with pytest.raises(KernelRefuses, match=message):
            forward(tex, logits, **changes)
    for changes, message in (
        ({"routing_map_format": 1}, "choices as bits are not emulated"),
        ({"intermediate_output": kept.bfloat16()}, r"kept is torch\.bfloat16, fp32 is expected"),
        ({"grad_logits": torch.empty(TOKENS, EXPERTS).bfloat16()}, r"into torch\.bfloat16"),
        ({"grad_logits": torch.empty(EXPERTS, TOKENS).t()}, "not contiguous"),
        *([({"use_dense_indices": True}, "choices as indices")] if TABLE.at_least("2.20") else []),
    ):
        with pytest.raises(KernelRefuses, match=message):
            backward(tex, choices, kept, logits, **changes)


def test_refusals(tex):
    logits = torch.randn(TOKENS, EXPERTS)
    for arguments, changes, message in (
        *([] if TABLE.at_least("2.17") else [(logits[None], {}, "logits are")]),
        (logits, {"topk": 6}, "6 of 5 experts"),
        (logits[:0], {}, "no token, or no expert"),
        (torch.randn(EXPERTS, TOKENS).t(), {}, "not contiguous"),
        (logits, {"score_function": "sigmoid"}, "sigmoid and expert bias are not emulated"),
        (logits, {"num_groups": 5, "group_topk": 2}, "groups, sigmoid"),
    ):
        with pytest.raises(KernelRefuses, match=message):
            forward(tex, arguments, **changes)
    _, choices, kept = forward(tex, logits)
    older = [] if TABLE.at_least("2.17") else [(logits.bfloat16(), "softmax", r"bfloat16, torch\.float32 forward")]
    for gradient, function, message in (
        (torch.randn(EXPERTS, TOKENS).t(), "softmax", "not contiguous"),
        *older,
        (logits, "sigmoid", "sigmoid is not emulated"),
    ):
        with pytest.raises(KernelRefuses, match=message):
            backward(tex, choices, kept, gradient, score_function=function)
