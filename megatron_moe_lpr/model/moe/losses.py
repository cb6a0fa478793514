"""The router's losses and their gradients, in the paper's units, per layer.

The gradients are closed forms: autograd would launch several kernels for each operation of a formula, on tensors so
small that launching is what they cost.
"""

import torch

from megatron_moe_lpr.model.configuration.config import LPRLossForm


def load_balancing_loss(mean_probabilities: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
    """N * sum_i f_i P_i (paper, section 3.1): k where the load is uniform.

    Args:
        mean_probabilities: [experts], P_i: mean probability of expert i over the tokens that are no padding; under
            sequence parallelism this rank's part of the mean: the partial losses of the ranks add up.
        load: [experts], f_i: share of the whole micro-batch's tokens with expert i among their k. No gradient.

    Returns:
        The loss, fp32, 0 for a micro-batch of padding alone.
    """
    return len(load) * (load * mean_probabilities).sum()


def load_balancing_gradient(
    probabilities: torch.Tensor, load: torch.Tensor, weights: torch.Tensor, coefficient: float
) -> torch.Tensor:
    """Gradient of coefficient * `load_balancing_loss` with respect to the logits.

    Args:
        probabilities: [tokens, experts], softmax of the logits.
        load: [experts], as above.
        weights: [tokens], the weight of each token in P_i.

    Returns:
        [tokens, experts].
    """
    # The product of a column and a row, times a number, in one kernel; with beta=0 the first argument is not read.
    slope_TE = torch.addr(probabilities, weights, load, beta=0.0, alpha=coefficient * len(load))
    return _through_softmax(slope_TE, probabilities)


def lpr_negative_log_likelihood(
    logits: torch.Tensor, form: LPRLossForm, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """-log of the router's probability of the original expert, for each token (paper, section 3.2).

    After a second expansion: of its probability of the experts of the token's language group and the groups before it.

    `reference` is the form of an earlier implementation, cross-entropy applied to probabilities already normalised:
    its floor is ln(1 + (N-1)/e) instead of 0 and its gradient is flat. For comparisons only.

    Args:
        logits: [tokens, experts], fp32.
        allowed: [tokens], how many experts, from the original one on, count as the token's; None: the original one.

    Returns:
        [tokens], fp32.
    """
    if form == "reference":
        logits = torch.softmax(logits, dim=-1)
    if allowed is None:
        return -torch.log_softmax(logits, dim=-1)[:, 0]
    return torch.logsumexp(logits, dim=-1) - torch.logsumexp(_own(logits, allowed), dim=-1)


def lpr_gradient(
    logits: torch.Tensor, probabilities: torch.Tensor, form: LPRLossForm, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """Gradient of each token's `lpr_negative_log_likelihood` with respect to its logits.

    Args:
        probabilities: [tokens, experts], softmax of the logits; in the paper's form overwritten.

    Returns:
        [tokens, experts].
    """
    if form == "paper":
        return _less_own(probabilities, logits, allowed)
    return _through_softmax(_less_own(torch.softmax(probabilities, -1), probabilities, allowed), probabilities)


def _less_own(probabilities: torch.Tensor, logits: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    """`probabilities`, the softmax of `logits`, less their softmax over the token's own experts alone; in place."""
    if allowed is None:
        probabilities[:, 0].sub_(1.0)
        return probabilities
    return probabilities.sub_(torch.softmax(_own(logits, allowed), dim=-1))


def _own(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Logits of the token's own experts, -inf for the others."""
    foreign_TE = torch.arange(logits.shape[-1], device=logits.device) >= allowed[:, None]
    return logits.masked_fill(foreign_TE, -torch.inf)


def _through_softmax(gradient: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Gradient of the logits from that of their softmax: p * (g - sum(g * p)), in one kernel."""
    return torch.ops.aten._softmax_backward_data(gradient, probabilities, -1, probabilities.dtype)
