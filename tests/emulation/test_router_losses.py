"""Megatron's fused load balancing against its unfused form in float64 (moe_utils.py)."""

import torch
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func

from tests.emulation.kernels import CALLS

TOKENS, EXPERTS, TOP_K, COEFFICIENT = 9, 5, 2, 0.3
KERNELS = (
    *("fused_score_for_moe_aux_loss_fwd", "fused_score_for_moe_aux_loss_bwd"),
    *("fused_moe_aux_loss_fwd", "fused_moe_aux_loss_bwd"),
)


def test_loss_and_gradient_of_the_logits(tex):
    from transformer_engine.pytorch.router import fused_compute_score_for_moe_aux_loss, fused_moe_aux_loss

    before = {name: CALLS.get(name, 0) for name in KERNELS}
    logits = torch.randn(TOKENS, EXPERTS, requires_grad=True)
    exact = logits.detach().double().requires_grad_()
    counts = torch.bincount(exact.topk(TOP_K).indices.flatten(), minlength=EXPERTS)
    expected = switch_load_balancing_loss_func(
        torch.softmax(exact, -1), counts, TOKENS, TOP_K, EXPERTS, COEFFICIENT, fused=False
    )
    (7 * expected).backward()
    choices, scores = fused_compute_score_for_moe_aux_loss(logits, TOP_K, "softmax")
    assert torch.equal(choices.sum(0), counts)
    loss = fused_moe_aux_loss(scores, choices.sum(0), TOKENS, EXPERTS, TOP_K, COEFFICIENT)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    (7 * loss).backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-8)
    assert {name: CALLS[name] - before[name] for name in KERNELS} == dict.fromkeys(KERNELS, 1)
