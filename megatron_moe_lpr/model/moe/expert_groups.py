"""Frozen experts of earlier expansions and trainable ones of the latest, behind one token dispatcher."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe_lpr.megatron.overriding import override, overrides_megatron


@overrides_megatron
class ExpertGroups(MegatronModule):
    """Two `TEGroupedMLP` in place of one: Transformer Engine's grouped product decides by its first weight whether all
    of its weights train (grouped_linear.py), so frozen and trainable experts must not share one.

    Each EP rank holds its share of both, the earlier experts first; `dispatch_order` sorts the router's columns so.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        earlier: int,
        newest: int,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        ranks = pg_collection.ep.size()
        self.num_earlier = earlier // ranks
        self.earlier = TEGroupedMLP(self.num_earlier, config, submodules, pg_collection, **_named(name, "earlier"))
        # A layer to which the latest expansion added nothing has earlier experts alone.
        self.newest = (
            TEGroupedMLP(newest // ranks, config, submodules, pg_collection, **_named(name, "newest"))
            if newest
            else None
        )

    @override
    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Compute each expert's rows.

        Args:
            tokens: [tokens, hidden], sorted by local expert, those of the earlier experts first.
            tokens_per_expert: [local experts].
            weights: [tokens], the router's weight of each row.

        Returns:
            [tokens, hidden] and no bias.
        """
        if self.newest is None:
            return self.earlier(tokens, tokens_per_expert, weights)
        counts = tokens_per_expert.split([self.num_earlier, len(tokens_per_expert) - self.num_earlier])
        rows = int(counts[0].sum())
        earlier, _ = self.earlier(tokens[:rows], counts[0], weights[:rows])
        newest, _ = self.newest(tokens[rows:], counts[1], weights[rows:])
        return torch.cat((earlier, newest)), None

    def backward_dw(self) -> None:
        """Do nothing: weight gradients are never delayed here."""


def _named(name: str | None, part: str) -> dict[str, str]:
    """What Megatron calls a part of what it has given a name, as it does from 0.18 on."""
    return {} if name is None else {"name": f"{name}.{part}"}


def dispatch_order(earlier: int, newest: int, ranks: int) -> list[int]:
    """The router's numbers of the new experts (0: the first new one) in the order in which the EP ranks hold them."""
    order: list[int] = []
    for rank in range(ranks):
        for first, count in ((0, earlier // ranks), (earlier, newest // ranks)):
            order += range(first + rank * count, first + (rank + 1) * count)
    return order
