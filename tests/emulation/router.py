"""The fused router: scores, top-k and renormalisation in one kernel."""

import torch

from tests.emulation.kernels import contiguous, kernel, refuse_unless


@kernel("router.py FusedTopkScoreFunction")
def fused_topk_with_score_function_fwd(
    logits: torch.Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
    score_function: str,
    expert_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights [tokens, experts], choices (bool) and what backward needs."""
    contiguous("fused_topk_with_score_function_fwd", logits)
    refuse_unless(logits.dim() == 2, "fused_topk_with_score_function_fwd: logits are [tokens, experts]")
    refuse_unless(logits.numel() > 0, "fused_topk_with_score_function_fwd: no token, or no expert")
    refuse_unless(
        score_function == "softmax" and not num_groups and expert_bias is None,
        "fused_topk_with_score_function_fwd: groups, sigmoid and expert bias are not emulated",
    )
    values = logits.detach().float()
    scores = torch.softmax(values, -1) if use_pre_softmax else values
    top, indices = torch.topk(scores, topk, dim=-1)
    chosen = top if use_pre_softmax else torch.softmax(top, -1)
    factor = 1.0 if scaling_factor is None else scaling_factor
    weights = torch.zeros_like(values).scatter(1, indices, chosen * factor).to(logits.dtype)
    choices = torch.zeros_like(values, dtype=torch.bool).scatter(1, indices, True)
    nowhere = torch.full_like(values, float("-inf"))
    kept = scores if use_pre_softmax else nowhere.scatter(1, indices, chosen)
    return weights, choices, kept.to(logits.dtype)


@kernel("router.py FusedTopkScoreFunction")
def fused_topk_with_score_function_bwd(
    num_tokens: int,
    num_experts: int,
    routing_map: torch.Tensor,
    intermediate_output: torch.Tensor,
    grad_probs: torch.Tensor,
    topk: int,
    use_pre_softmax: bool,
    scaling_factor: float | None,
    score_function: str,
) -> torch.Tensor:
    """Gradient of the logits."""
    contiguous("fused_topk_with_score_function_bwd", grad_probs, intermediate_output, routing_map)
    same = grad_probs.dtype == intermediate_output.dtype
    refuse_unless(same, f"fused_topk_with_score_function_bwd: {grad_probs.dtype}, {intermediate_output.dtype} forward")
    refuse_unless(score_function == "softmax", "fused_topk_with_score_function_bwd: sigmoid is not emulated")
    factor = 1.0 if scaling_factor is None else scaling_factor
    gradient = grad_probs.float().masked_fill(~routing_map, 0.0) * factor
    # After a softmax over the chosen ones alone the others hold -inf.
    scores = intermediate_output.float()
    scores = scores if use_pre_softmax else scores.masked_fill(~routing_map, 0.0)
    return (scores * (gradient - (gradient * scores).sum(-1, keepdim=True))).to(grad_probs.dtype)
