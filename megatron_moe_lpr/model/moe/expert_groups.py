"""Frozen experts, of a mixture base and of earlier expansions, and trainable ones, behind one token dispatcher."""

from collections.abc import Mapping, Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe_lpr.megatron.overriding import override, overrides_megatron


@overrides_megatron
class ExpertGroups(MegatronModule):
    """Several `TEGroupedMLP` in place of one: Transformer Engine's grouped product decides by its first weight whether
    all of its weights train (grouped_linear.py), so frozen and trainable experts must not share one.

    Each EP rank holds its share of every group, in this order; `dispatch_order` sorts the router's columns so.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        groups: Mapping[str, int],
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        """`groups`: experts of each group on all EP ranks together, by the name of its module: `base` (a mixture
        base's), `earlier` (those of earlier expansions), `newest`. A group without experts gets no module."""
        super().__init__(config=config)
        ranks = pg_collection.ep.size()
        self.counts = {group: count // ranks for group, count in groups.items() if count}
        for group, count in self.counts.items():
            self.add_module(group, TEGroupedMLP(count, config, submodules, pg_collection, **_named(name, group)))

    @override
    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Compute each expert's rows.

        Args:
            tokens: [tokens, hidden], sorted by local expert, group by group.
            tokens_per_expert: [local experts].
            weights: [tokens], the router's weight of each row.

        Returns:
            [tokens, hidden] and no bias.
        """
        trains = {group: _trains(self.get_submodule(group)) for group in self.counts}
        # A product whose weights train keeps its rows, and a view of them would keep those of frozen experts alive too.
        # In FP8 a rounded copy is kept.
        apart = torch.is_grad_enabled() and not all(trains.values()) and not self.config.fp8
        outputs, first = [], 0
        for group, counts in zip(self.counts, tokens_per_expert.split(list(self.counts.values())), strict=True):
            end = first + int(counts.sum())
            rows = tokens[first:end].clone() if apart and trains[group] else tokens[first:end]
            outputs.append(self.get_submodule(group)(rows, counts, weights[first:end])[0])
            first = end
        return torch.cat(outputs), None

    def backward_dw(self) -> None:
        """Do nothing: weight gradients are never delayed here."""


def _trains(module: torch.nn.Module) -> bool:
    return any(weight.requires_grad for weight in module.parameters())


def _named(name: str | None, part: str) -> dict[str, str]:
    """What Megatron calls a part of what it has given a name, as it does from 0.18 on."""
    return {} if name is None else {"name": f"{name}.{part}"}


def dispatch_order(groups: Sequence[int], ranks: int) -> list[int]:
    """The numbers of the experts that the EP ranks share (0: the first of them) in the order in which they hold them.

    Args:
        groups: experts of each group on all ranks together.
    """
    order: list[int] = []
    for rank in range(ranks):
        first = 0
        for count in groups:
            share = count // ranks
            order += range(first + rank * share, first + (rank + 1) * share)
            first += count
    return order
