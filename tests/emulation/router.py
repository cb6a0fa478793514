"""The fused router: scores, top-k and renormalisation in one kernel."""

from typing import Any

import torch

from tests.emulation.kernels import contiguous, kernel, refuse_unless

FORWARD, BACKWARD = "fused_topk_with_score_function_fwd", "fused_topk_with_score_function_bwd"
BYTEMAP = 0


@kernel("router.py FusedTopkScoreFunction", name=FORWARD)
def forward_2_11(
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
    weights, choices, kept = _forward(locals())
    return weights, choices, kept.to(logits.dtype)


@kernel("router.py FusedTopkScoreFunction", name=FORWARD)
def forward_2_17(
    logits: torch.Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
    score_function: str,
    expert_bias: torch.Tensor | None,
    routing_map_format: int = BYTEMAP,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for logits [..., experts]; what backward needs is fp32."""
    refuse_unless(routing_map_format == BYTEMAP, f"{FORWARD}: choices as bits are not emulated")
    return _forward(locals())


@kernel("router.py FusedTopkScoreFunction", name=FORWARD)
def forward_2_20(
    logits: torch.Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
    score_function: str,
    expert_bias: torch.Tensor | None,
    routing_map_format: int = BYTEMAP,
    topk_indices: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same; the choices may be asked for as indices."""
    refuse_unless(routing_map_format == BYTEMAP, f"{FORWARD}: choices as bits are not emulated")
    refuse_unless(topk_indices is None, f"{FORWARD}: choices as indices are not emulated")
    return _forward(locals())


def _forward(call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits, topk, use_pre_softmax = call["logits"], call["topk"], call["use_pre_softmax"]
    contiguous(FORWARD, logits)
    newer = "routing_map_format" in call
    refuse_unless(newer or logits.dim() == 2, f"{FORWARD}: logits are [tokens, experts]")
    refuse_unless(logits.numel() > 0, f"{FORWARD}: no token, or no expert")
    refuse_unless(0 < topk <= logits.shape[-1], f"{FORWARD}: {topk} of {logits.shape[-1]} experts")
    refuse_unless(
        call["score_function"] == "softmax" and not call["num_groups"] and call["expert_bias"] is None,
        f"{FORWARD}: groups, sigmoid and expert bias are not emulated",
    )
    values = logits.detach().float()
    scores = torch.softmax(values, -1) if use_pre_softmax else values
    top, indices = torch.topk(scores, topk, dim=-1)
    chosen = top if use_pre_softmax else torch.softmax(top, -1)
    factor = 1.0 if call["scaling_factor"] is None else call["scaling_factor"]
    weights = torch.zeros_like(values).scatter(-1, indices, chosen * factor).to(logits.dtype)
    choices = torch.zeros_like(values, dtype=torch.bool).scatter(-1, indices, True)
    nowhere = torch.full_like(values, float("-inf"))
    return weights, choices, scores if use_pre_softmax else nowhere.scatter(-1, indices, chosen)


@kernel("router.py FusedTopkScoreFunction", name=BACKWARD)
def backward_2_11(
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
    same = grad_probs.dtype == intermediate_output.dtype
    refuse_unless(same, f"{BACKWARD}: {grad_probs.dtype}, {intermediate_output.dtype} forward")
    return _backward(locals())


@kernel("router.py FusedTopkScoreFunction", name=BACKWARD)
def backward_2_17(
    routing_map: torch.Tensor,
    intermediate_output: torch.Tensor,
    grad_probs: torch.Tensor,
    grad_logits: torch.Tensor,
    topk: int,
    use_pre_softmax: bool,
    scaling_factor: float | None,
    score_function: str,
    routing_map_format: int = BYTEMAP,
) -> None:
    """Gradient of the logits into `grad_logits`."""
    refuse_unless(routing_map_format == BYTEMAP, f"{BACKWARD}: choices as bits are not emulated")
    _write_gradient(locals())


@kernel("router.py FusedTopkScoreFunction", name=BACKWARD)
def backward_2_20(
    routing_map: torch.Tensor,
    intermediate_output: torch.Tensor,
    grad_probs: torch.Tensor,
    grad_logits: torch.Tensor,
    topk: int,
    use_pre_softmax: bool,
    scaling_factor: float | None,
    score_function: str,
    use_dense_indices: bool = False,
    routing_map_format: int = BYTEMAP,
) -> None:
    """The same; the choices may be given as indices."""
    refuse_unless(routing_map_format == BYTEMAP, f"{BACKWARD}: choices as bits are not emulated")
    refuse_unless(not use_dense_indices, f"{BACKWARD}: choices as indices are not emulated")
    _write_gradient(locals())


def _write_gradient(call: dict[str, Any]) -> None:
    """Mirrors csrc/extensions/router.cpp: both gradients have the dtype of the logits, what forward kept is fp32."""
    target, gradient, kept = call["grad_logits"], call["grad_probs"], call["intermediate_output"]
    contiguous(BACKWARD, target)
    same = target.dtype == gradient.dtype and target.shape == gradient.shape
    refuse_unless(same, f"{BACKWARD}: {gradient.dtype} {tuple(gradient.shape)} into {target.dtype}")
    refuse_unless(kept.dtype == torch.float32, f"{BACKWARD}: what forward kept is {kept.dtype}, fp32 is expected")
    target.copy_(_backward(call))


def _backward(call: dict[str, Any]) -> torch.Tensor:
    gradient, kept, choices = call["grad_probs"], call["intermediate_output"], call["routing_map"]
    contiguous(BACKWARD, gradient, kept, choices)
    refuse_unless(call["score_function"] == "softmax", f"{BACKWARD}: sigmoid is not emulated")
    factor = 1.0 if call["scaling_factor"] is None else call["scaling_factor"]
    grad_scores = gradient.float().masked_fill(~choices, 0.0) * factor
    # After a softmax over the chosen ones alone the others hold -inf.
    scores = kept.float()
    scores = scores if call["use_pre_softmax"] else scores.masked_fill(~choices, 0.0)
    return (scores * (grad_scores - (grad_scores * scores).sum(-1, keepdim=True))).to(gradient.dtype)
