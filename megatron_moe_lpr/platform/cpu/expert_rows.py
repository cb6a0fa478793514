"""bf16: experts get a number of rows that returns.

For each shape of a bf16 product that it has not met oneDNN compiles a kernel, which takes as long as a third of a small
product, and an expert gets another number of tokens in each step. Rows of zeros up to one of few numbers let nearly all
products find their kernel.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.moe.experts import TEGroupedMLP

from megatron_moe_lpr.megatron.overriding import replace

STEPS_TO_TWICE = 16
"""Numbers of rows between one and its double: of many rows at most a sixteenth are zeros."""
SMALLEST_STEP = 32
"""So few more rows take less time than a kernel to compile."""


def rounded(rows: int) -> int:
    """The least number of few that is no smaller; none for none."""
    step = max(SMALLEST_STEP, (1 << (rows - 1).bit_length()) // (2 * STEPS_TO_TWICE)) if rows else 1
    return -(-rows // step) * step


class _Spread(torch.autograd.Function):
    """Runs of rows to the beginnings of longer runs, zeros behind them; its gradient is the way back."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, counts: Sequence[int], longer: Sequence[int]) -> torch.Tensor:
        ctx.counts, ctx.longer = counts, longer
        return spread(rows, counts, longer)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gather(gradient, ctx.counts, ctx.longer), None, None


class _Gather(torch.autograd.Function):
    """The beginnings of runs; its gradient is `_Spread`."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, counts: Sequence[int], longer: Sequence[int]) -> torch.Tensor:
        ctx.counts, ctx.longer = counts, longer
        return gather(rows, counts, longer)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return spread(gradient, ctx.counts, ctx.longer), None, None


def spread(rows: torch.Tensor, counts: Sequence[int], longer: Sequence[int]) -> torch.Tensor:
    """[sum of counts, ...] to [sum of longer, ...]."""
    output = rows.new_empty(sum(longer), *rows.shape[1:])
    for run, result in zip(rows.split(counts), output.split(longer), strict=True):
        result[: len(run)] = run
        result[len(run) :] = 0
    return output


def gather(rows: torch.Tensor, counts: Sequence[int], longer: Sequence[int]) -> torch.Tensor:
    """[sum of longer, ...] to [sum of counts, ...]."""
    return torch.cat([run[:count] for run, count in zip(rows.split(longer), counts, strict=True)])


def install() -> None:
    """moe/experts.py: rows of zeros around `TEGroupedMLP.forward`, where Megatron itself has them for FP8."""
    original = TEGroupedMLP.forward

    @functools.wraps(original)
    def forward(
        self: TEGroupedMLP,
        tokens: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        weights: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        counts = tokens_per_expert.tolist()
        longer = [rounded(count) for count in counts]
        if tokens.dtype != torch.bfloat16 or counts == longer:
            return original(self, tokens, tokens_per_expert, weights)
        output, bias = original(
            self, _Spread.apply(tokens, counts, longer), torch.tensor(longer), _Spread.apply(weights, counts, longer)
        )
        return _Gather.apply(output, counts, longer), bias

    replace(TEGroupedMLP, forward=forward)
