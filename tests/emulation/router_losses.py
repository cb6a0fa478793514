"""Megatron's fused load balancing: scores over all experts, and the loss of their sums; one kernel each."""

import torch

from tests.emulation.kernels import contiguous, kernel, refuse_unless
from tests.emulation.router import BYTEMAP

SCORES, SCORES_BACKWARD = "fused_score_for_moe_aux_loss_fwd", "fused_score_for_moe_aux_loss_bwd"


@kernel("router.py FusedComputeScoresForMoEAuxLoss", name=SCORES)
def scores_2_11(
    logits: torch.Tensor, topk: int, score_function: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax over all experts [tokens, experts], choices (bool) and what backward needs."""
    return _scores(logits, topk, score_function)


def _scores(logits: torch.Tensor, topk: int, score_function: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    contiguous(SCORES, logits)
    refuse_unless(score_function == "softmax", f"{SCORES}: sigmoid is not emulated")
    refuse_unless(logits.dim() == 2 and logits.numel() > 0, f"{SCORES}: logits are [tokens, experts]")
    scores = torch.softmax(logits.detach().float(), -1)
    choices = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(topk, dim=-1).indices, True)
    return scores, choices, scores.clone()


@kernel("router.py FusedComputeScoresForMoEAuxLoss", name=SCORES)
def scores_2_17(
    logits: torch.Tensor, topk: int, score_function: str, routing_map_format: int = BYTEMAP
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same; choices may be asked for as bits."""
    refuse_unless(routing_map_format == BYTEMAP, f"{SCORES}: choices as bits are not emulated")
    return _scores(logits, topk, score_function)


@kernel("router.py FusedComputeScoresForMoEAuxLoss", name=SCORES_BACKWARD)
def scores_backward_2_11(
    num_tokens: int,
    num_experts: int,
    intermediate_output: torch.Tensor,
    grad_scores: torch.Tensor,
    topk: int,
    score_function: str,
) -> torch.Tensor:
    """Gradient of the logits."""
    return _scores_backward(intermediate_output, grad_scores)


def _scores_backward(intermediate_output: torch.Tensor, grad_scores: torch.Tensor) -> torch.Tensor:
    contiguous(SCORES_BACKWARD, intermediate_output, grad_scores)
    mean = (grad_scores * intermediate_output).sum(-1, keepdim=True)
    return intermediate_output * (grad_scores - mean)


@kernel("router.py FusedComputeScoresForMoEAuxLoss", name=SCORES_BACKWARD)
def scores_backward_2_17(
    intermediate_output: torch.Tensor,
    grad_scores: torch.Tensor,
    grad_logits: torch.Tensor,
    topk: int,
    score_function: str,
) -> None:
    """Gradient of the logits into `grad_logits`."""
    contiguous(SCORES_BACKWARD, grad_logits)
    grad_logits.copy_(_scores_backward(intermediate_output, grad_scores))


@kernel("router.py FusedAuxLoss")
def fused_moe_aux_loss_fwd(
    probs: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    total_num_tokens: int,
    num_experts: int,
    num_rows: int,
    num_cols: int,
    topk: int,
    coeff: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the factor that backward multiplies with."""
    contiguous("fused_moe_aux_loss_fwd", probs, tokens_per_expert)
    factor = torch.tensor(num_experts * coeff / topk / total_num_tokens**2, dtype=torch.float32)
    loss = (probs.float().sum(0) * tokens_per_expert).sum() * factor
    return loss.to(probs.dtype), factor


@kernel("router.py FusedAuxLoss")
def fused_moe_aux_loss_bwd(
    Const_buf: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    num_rows: int,
    num_cols: int,
    grad_aux_loss: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the probabilities, [tokens, experts]."""
    row = Const_buf * tokens_per_expert * grad_aux_loss
    return row.to(grad_aux_loss.dtype).expand(num_rows, num_cols).contiguous()
