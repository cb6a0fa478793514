"""A row for each expert of a token, sorted by expert, and the sum of a token's rows."""

import dataclasses

import torch
from megatron.core.transformer.moe import token_dispatcher


@dataclasses.dataclass(frozen=True)
class SortedRows:
    """Copies of tokens, those of the first expert first; one of its experts after the other has a token's copies."""

    rows: torch.Tensor
    """[rows, hidden]."""
    weights: torch.Tensor
    """[rows], the router's weight of the expert for the token."""
    choices: torch.Tensor
    """[tokens, experts], bool."""
    order: torch.Tensor
    """Where the rows came from, as Megatron's `permute` returns it."""
    fused: bool

    def split(self, count: int) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Rows and weights of the first `count` rows, and of the others."""
        sizes = [count, len(self.rows) - count]
        rows, weights = self.rows.split(sizes), self.weights.split(sizes)
        return (rows[0], weights[0]), (rows[1], weights[1])

    def sum_by_token(self, outputs: torch.Tensor) -> torch.Tensor:
        """Add up the rows of each token: [rows, hidden] to [tokens, hidden], zeros for a token without a row."""
        shape = torch.Size((len(self.choices), outputs.shape[-1]))
        return token_dispatcher.unpermute(outputs, self.order, shape, routing_map=self.choices, fused=self.fused)


def sort_rows(
    tokens: torch.Tensor, weights: torch.Tensor, choices: torch.Tensor, count: int, fused: bool
) -> SortedRows:
    """Copy each token once for every expert that it chose.

    Args:
        tokens: [tokens, hidden].
        weights: [tokens, experts], fp32, contiguous.
        choices: [tokens, experts], bool, contiguous.
        count: number of choices.
        fused: whether Transformer Engine's kernels sort (`moe_permute_fusion`).
    """
    rows, row_weights, order, *_ = token_dispatcher.permute(
        tokens, choices, probs=weights, num_out_tokens=count, fused=fused
    )
    return SortedRows(rows, row_weights, choices, order, fused)
