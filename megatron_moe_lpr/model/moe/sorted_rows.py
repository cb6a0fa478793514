"""A row for each expert of a token, sorted by expert, and the sum of a token's rows."""

import dataclasses
from typing import Any

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

    def split(
        self, count: int, taken: int
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Rows and weights of the first expert, and of the others.

        Args:
            count: rows of the first expert.
            taken: rows that the first expert is given, `count` or more. Those behind its own belong to other experts;
                their outputs and gradients are dropped (`join`). Padding rows would have to be copied behind its own.
        """
        own_CD, new_RD = _Split.apply(self.rows, count, taken)
        own_weights_C, new_weights_R = _Split.apply(self.weights, count, taken)
        return (own_CD, own_weights_C), (new_RD, new_weights_R)

    def sum_by_token(self, outputs: torch.Tensor) -> torch.Tensor:
        """Add up the rows of each token: [rows, hidden] to [tokens, hidden], zeros for a token without a row."""
        shape = torch.Size((len(self.choices), outputs.shape[-1]))
        return token_dispatcher.unpermute(outputs, self.order, shape, routing_map=self.choices, fused=self.fused)


def join(own_CD: torch.Tensor, new_RD: torch.Tensor, count: int, trains: bool) -> torch.Tensor:
    """Outputs of all rows from those of the first expert, of which the first `count` are its own, and of the others.

    Args:
        trains: whether the first expert's weights take a gradient: then the outputs that are dropped get gradients of
            zero. Otherwise those of whatever rows lie there: only gradients of rows that are dropped too come of them.

    Returns:
        [rows, hidden].
    """
    return _Join.apply(own_CD, new_RD, count, trains)


class _Split(torch.autograd.Function):
    """The first rows and the last ones, which may overlap; views."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, count: int, taken: int) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.count = count
        return rows[:taken], rows[count:]

    @staticmethod
    def backward(ctx: Any, grad_own: torch.Tensor, grad_new: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return torch.cat((grad_own[: ctx.count], grad_new)), None, None


class _Join(torch.autograd.Function):
    """Concatenation without the last of the first rows."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, new: torch.Tensor, count: int, trains: bool) -> torch.Tensor:
        ctx.count, ctx.taken, ctx.trains = count, len(own), trains
        return torch.cat((own[:count], new))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        count, taken = ctx.count, ctx.taken
        grad_own, grad_new = grad[:taken], grad[count:]
        if ctx.trains and taken > count:
            grad_own = torch.cat((grad[:count], torch.zeros_like(grad[count:taken])))
        return grad_own, grad_new, None, None


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
