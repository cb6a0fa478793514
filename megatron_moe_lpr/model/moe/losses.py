"""The router's losses, in the paper's units, per layer."""

import torch

from megatron_moe_lpr.model.configuration.config import LPRLossForm


def load_balancing_loss(
    probabilities: torch.Tensor, tokens_per_expert: torch.Tensor, num_tokens: torch.Tensor
) -> torch.Tensor:
    """N * sum_i f_i P_i (paper, section 3.1): k where the load is uniform.

    f_i = tokens_per_expert_i / num_tokens counts all k choices of a token and carries no gradient;
    P_i is the mean probability of expert i.

    Args:
        probabilities: [tokens, experts] of the tokens that are no padding; other rows are zeros. Under sequence
            parallelism this rank's tokens: the partial losses of the ranks add up.
        tokens_per_expert: [experts], of the whole micro-batch.
        num_tokens: tokens of the whole micro-batch.

    Returns:
        The loss, fp32, 0 for a micro-batch of padding alone.
    """
    count = num_tokens.clamp(min=1.0)
    load_E = tokens_per_expert / count
    return len(load_E) * (load_E * probabilities.sum(dim=0) / count).sum()


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
    foreign_TE = torch.arange(logits.shape[-1], device=logits.device) >= allowed[:, None]
    own_TE = logits.masked_fill(foreign_TE, -torch.inf)
    return torch.logsumexp(logits, dim=-1) - torch.logsumexp(own_TE, dim=-1)
