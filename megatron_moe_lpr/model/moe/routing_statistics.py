"""Which experts the tokens choose: counted in every router, added up over ranks for a report."""

import dataclasses
from collections.abc import Iterable

import torch
import torch.distributed as dist

from megatron_moe_lpr.model.moe.language_groups import LANGUAGE_GROUPS
from megatron_moe_lpr.platform.collectives import collective_device

TOKENS, PROBABILITY, CHOSEN, LIKELIHOOD, EXPERTS = range(5)
"""Columns of a language group's sums: tokens, sums of the original experts' probability, of their share in a token's
choices, of the LPR loss; from EXPERTS on, the tokens that chose each expert."""


class RoutingStatistics:
    """Sums over the tokens of a router since the last reset, for original and expanded languages apart."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.reset()

    def reset(self) -> None:
        """Set all sums to 0."""
        self.sums = torch.zeros(len(LANGUAGE_GROUPS), EXPERTS + self.num_experts, dtype=torch.float64)
        self.load_balancing = torch.zeros(2, dtype=torch.float64)
        """Sum of the load balancing losses, and number of their micro-batches."""

    def add(
        self,
        *,
        original: torch.Tensor,
        valid: torch.Tensor,
        probability: torch.Tensor,
        likelihood: torch.Tensor,
        choices: torch.Tensor,
        load_balancing: torch.Tensor,
        original_experts: int = 1,
        micro_batches: float,
    ) -> None:
        """Add a micro-batch.

        Args:
            original, valid: [tokens], bool.
            probability: [tokens], router's probability of the original expert, or of all that a mixture base has.
            likelihood: [tokens], LPR loss of the token.
            choices: [tokens, experts], bool.
            original_experts: how many original experts there are, which come first.
            load_balancing: the layer's loss, in the paper's unit.
            micro_batches: 1, or this rank's share of one.
        """
        groups_GT = torch.stack((original & valid, ~original & valid)).float()
        ones_T = torch.ones_like(probability)
        columns_T4 = torch.stack((ones_T, probability, _original_share(choices, original_experts), likelihood), dim=1)
        # One product adds up every column over the tokens of either group.
        sums_GM = groups_GT @ torch.cat((columns_T4, choices.float()), dim=1)
        # The sums stay on the device: a copy to the host would wait for the whole queue of kernels.
        self.sums = self.sums.to(sums_GM.device) + sums_GM.double()
        share = torch.full_like(load_balancing, micro_batches)
        self.load_balancing = self.load_balancing.to(sums_GM.device) + torch.stack((load_balancing, share)).double()


def _original_share(choices: torch.Tensor, original_experts: int) -> torch.Tensor:
    """Share of a token's choices that are original experts, [tokens]: 0 or 1 of a single one among its top k."""
    if original_experts == 1:
        return choices[:, 0].float()
    return choices[:, :original_experts].sum(dim=1) / choices.sum(dim=1)


@dataclasses.dataclass(frozen=True)
class RoutingReport:
    """Routing of the whole model, added up over all ranks.

    Tensors are [layers, language groups]; NaN where there was no token, and in dense layers.
    """

    tokens: torch.Tensor
    probability: torch.Tensor
    """Mean probability of the original expert, or of all original experts of a mixture base."""
    top_k_share: torch.Tensor
    """Share of tokens with the original expert among their top k; of a mixture base the share of original experts in
    the tokens' choices."""
    lpr_loss: torch.Tensor
    """Mean LPR loss of the tokens."""
    expert_share: torch.Tensor
    """[layers, language groups, experts]: share of tokens that chose each expert; a row sums to k."""
    load_balancing: torch.Tensor
    """[layers]: mean load balancing loss of the micro-batches."""
    original_experts: int = 1
    """Original experts of a layer: 1, or those of a mixture base."""

    def mean_over_layers(self, values: torch.Tensor, group: str) -> float:
        """Mean over MoE layers of a [layers, language groups] tensor; NaN where the group had no token."""
        return values[:, LANGUAGE_GROUPS.index(group)].nanmean().item()


def gather_routing(
    routers: Iterable[tuple[int, RoutingStatistics]], num_layers: int, max_experts: int
) -> RoutingReport:
    """Add up the statistics of all ranks. Every rank must call it.

    Args:
        routers: layer index from 0 and statistics of this rank's routers.
        max_experts: experts of the model's largest layer.
    """
    groups, width = len(LANGUAGE_GROUPS), EXPERTS + max_experts
    # One row a layer and one all-reduce: the groups' sums, then loss and micro-batches of load balancing.
    sums = torch.zeros(num_layers, groups * width + 2, dtype=torch.float64)
    for layer, statistics in routers:
        sums_GM = torch.nn.functional.pad(statistics.sums.cpu(), (0, max_experts - statistics.num_experts))
        sums[layer] += torch.cat((sums_GM.flatten(), statistics.load_balancing.cpu()))
    if dist.is_initialized() and dist.get_world_size() > 1:
        sums = sums.to(collective_device())
        dist.all_reduce(sums)
        sums = sums.cpu()
    return _report(sums[:, :-2].view(num_layers, groups, width), sums[:, -2:])


def _report(sums_LGM: torch.Tensor, balance_L2: torch.Tensor) -> RoutingReport:
    tokens_LG = sums_LGM[..., TOKENS]
    means_LGM = sums_LGM / tokens_LG.unsqueeze(-1)  # 0 / 0 is NaN: no such token
    return RoutingReport(
        tokens=tokens_LG,
        probability=means_LGM[..., PROBABILITY],
        top_k_share=means_LGM[..., CHOSEN],
        lpr_loss=means_LGM[..., LIKELIHOOD],
        expert_share=means_LGM[..., EXPERTS:],
        load_balancing=balance_L2[:, 0] / balance_L2[:, 1],
    )
