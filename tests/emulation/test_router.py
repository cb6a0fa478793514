"""The fused router against softmax, top-k and their autograd in float64."""

import pytest
import torch

from tests.emulation.kernels import KernelRefuses

TOKENS, EXPERTS, TOP_K = 9, 5, 2


def forward(tex, logits, **changes):
    fields = {"topk": TOP_K, "use_pre_softmax": False, "num_groups": None, "group_topk": None, "scaling_factor": None}
    return tex.fused_topk_with_score_function_fwd(
        logits=logits, **(fields | {"score_function": "softmax", "expert_bias": None} | changes)
    )


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
    found = tex.fused_topk_with_score_function_bwd(
        TOKENS, EXPERTS, choices, kept, gradient, TOP_K, before, factor, "softmax"
    )
    torch.testing.assert_close(found.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_equal_logits_choose_two_experts(tex):
    weights, choices, _ = forward(tex, torch.zeros(TOKENS, EXPERTS))
    assert (choices.sum(1) == TOP_K).all()
    assert torch.equal(weights[choices], torch.full((TOKENS * TOP_K,), 0.5))


def test_results_have_the_logits_format(tex):
    weights, _, kept = forward(tex, torch.randn(TOKENS, EXPERTS).bfloat16())
    assert (weights.dtype, kept.dtype) == (torch.bfloat16, torch.bfloat16)


def test_refusals(tex):
    logits = torch.randn(TOKENS, EXPERTS)
    for arguments, changes, message in (
        (logits[None], {}, "logits are"),
        (logits[:0], {}, "no token, or no expert"),
        (torch.randn(EXPERTS, TOKENS).t(), {}, "not contiguous"),
        (logits, {"score_function": "sigmoid"}, "sigmoid and expert bias are not emulated"),
        (logits, {"num_groups": 5, "group_topk": 2}, "groups, sigmoid"),
    ):
        with pytest.raises(KernelRefuses, match=message):
            forward(tex, arguments, **changes)
    _, choices, kept = forward(tex, logits)
    for gradient, function, message in (
        (torch.randn(EXPERTS, TOKENS).t(), "softmax", "not contiguous"),
        (logits.bfloat16(), "softmax", r"torch\.bfloat16, torch\.float32 forward"),
        (logits, "sigmoid", "sigmoid is not emulated"),
    ):
        with pytest.raises(KernelRefuses, match=message):
            tex.fused_topk_with_score_function_bwd(
                TOKENS, EXPERTS, choices, kept, gradient, TOP_K, False, None, function
            )
