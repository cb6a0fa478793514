"""The loss over the vocabulary without a second copy of the logits, where one rank has all of it.

tensor_parallel/cross_entropy.py keeps the softmax in fp32 beside bf16 logits and passes over all of it seven times.
"""

import functools
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_moe_lpr.megatron.overriding import replace

BYTES = 1 << 22
"""fp32 logits of a turn, few enough to stay in the cache."""


class CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[target]. The gradient takes the place of the logits, which nothing else reads."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """[..., vocabulary] and [...] to fp32 [...]."""
        rows, targets = logits.flatten(0, -2), target.flatten()
        normalizer = torch.empty(len(rows))
        loss = torch.empty(len(rows))
        for logit, index, sums, result in _turns(rows, targets, normalizer, loss):
            torch.logsumexp(logit.float(), dim=-1, out=sums)
            torch.sub(sums, logit.gather(-1, index.unsqueeze(-1)).squeeze(-1), out=result)
        ctx.save_for_backward(rows, targets, normalizer)
        ctx.shape = logits.shape
        return loss.view(target.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(softmax(logits) - one-hot(target)) * gradient, in the logits' dtype."""
        rows, targets, normalizer = ctx.saved_tensors
        for logit, index, sums, scale in _turns(rows, targets, normalizer, gradient.flatten()):
            probability = torch.sub(logit, sums.unsqueeze(-1)).exp_()
            probability.scatter_add_(-1, index.unsqueeze(-1), torch.full((len(index), 1), -1.0))
            torch.mul(probability, scale.unsqueeze(-1), out=logit)
        return rows.view(ctx.shape), None


def _turns(rows: torch.Tensor, *others: torch.Tensor) -> zip:
    count = max(1, BYTES // (4 * rows.shape[-1]))
    return zip(*(tensor.split(count) for tensor in (rows, *others)), strict=True)


def install() -> None:
    """language_module.py `compute_language_model_loss`, without tensor parallelism and label smoothing."""
    original = tensor_parallel.vocab_parallel_cross_entropy

    @functools.wraps(original)
    def cross_entropy(
        logits: torch.Tensor, target: torch.Tensor, label_smoothing: float = 0.0, **options: Any
    ) -> torch.Tensor:
        if label_smoothing or parallel_state.get_tensor_model_parallel_world_size() > 1:
            return original(logits, target, label_smoothing, **options)
        return CrossEntropy.apply(logits, target)

    replace(tensor_parallel, vocab_parallel_cross_entropy=cross_entropy)
