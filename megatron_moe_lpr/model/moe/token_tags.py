"""Token tags: what each token contributes to the router's losses, carried by the model's own arguments."""

import torch

PRIOR = 0
"""Tag 0: weight of the token in the LPR loss; above 0 exactly for tokens of languages known before the latest
expansion: the original ones and, after a second expansion, those of the earlier ones."""

MICRO_BATCH = 1
"""Tag 1: the token's part of its micro-batch's weight in the load balancing loss; above 0 exactly for tokens that are
no padding."""

GROUP = 2
"""Tag 2: number of the token's language group, 0 for original languages; without meaning where tag 0 is 0."""

SHARE = 3
"""Tag 3: 1 / tokens of the micro-batch that are no padding; 0 for padding. A sum with these weights is a mean over the
micro-batch, without that a router counts its tokens."""


def token_tags(
    original: torch.Tensor,
    valid: torch.Tensor,
    lpr_weight: float | torch.Tensor = 1.0,
    micro_batch_weight: float | torch.Tensor = 1.0,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """Tag the tokens of a micro-batch.

    The weights carry the normalisation over the whole step, so that sums over micro-batches and ranks are means over
    the global batch whatever the layout: no router needs to know how many micro-batches there are.

    Args:
        original: [batch, sequence] bool, F(t) of the paper: the token belongs to an original language; after a second
            expansion, to any but the latest one's.
        valid: [batch, sequence] bool, the token is no padding.
        lpr_weight: weight of each valid token of an original language.
        micro_batch_weight: weight of this micro-batch.
        groups: [batch, sequence], language group of each token; None: only original languages have a prior.

    Returns:
        [batch, sequence, 4], fp32.
    """
    valid_BS = valid.float()
    share_BS = valid_BS / valid_BS.sum().clamp(min=1.0)
    groups_BS = torch.zeros_like(valid_BS) if groups is None else groups.clamp(min=0).float()
    prior_BS = original * valid_BS * lpr_weight
    return torch.stack((prior_BS, share_BS * micro_batch_weight, groups_BS, share_BS), dim=-1)
