"""The LM loss over an extended vocabulary, with a loss on the probability of new tokens in its gradient.

Text of a language that the model already knew has hardly any new token in it. Its LM loss is then the loss among the
known tokens and -log(1 - mass), where mass is the probability that all new tokens take together. The second part is
what a vocabulary extension costs these languages; `--new-token-loss-coeff` gives it more weight.
"""

from typing import Any

import torch

SMALLEST_SUM = 1e-30
"""In place of a sum of the known tokens' exponentials that is 0 in fp32, beside which the loss would be infinite."""


class CrossEntropyWithNewTokenLoss(torch.autograd.Function):
    """Return each token's cross-entropy; in backward add the gradient of its new-token loss.

    Mirrors tensor_parallel/cross_entropy.py `_VocabParallelCrossEntropy`, in whose softmax the new tokens' probability
    is known already: no second copy of the logits, and one exchange over TP ranks less.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        first_new: int,
        group: torch.distributed.ProcessGroup,
    ) -> torch.Tensor:
        """Compute the cross-entropy.

        Args:
            logits: this TP rank's, [..., columns]; fp32 ones are overwritten.
            labels: columns of the right tokens in the logits of all TP ranks side by side, [...].
            weights: weight of each token's -log(1 - mass) beside its cross-entropy, [...], fp32; 0 where the right
                token is a new one.
            first_new: first of the rank's columns of new tokens, which are its last ones.
            group: the TP ranks.

        Returns:
            [...] in nats, fp32, without the new-token loss.
        """
        columns = logits.shape[-1]
        exponentials = logits.float()
        largest = exponentials.amax(-1)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
        exponentials.sub_(largest.unsqueeze(-1))
        column = labels.flatten() - group.rank() * columns
        is_here = (column >= 0) & (column < columns)
        column = column.masked_fill(~is_here, 0)
        label_logits = exponentials.view(-1, columns)[_rows(column), column].masked_fill(~is_here, 0.0)
        exponentials.exp_()
        known, new = exponentials[..., :first_new].sum(-1), exponentials[..., first_new:].sum(-1)
        sums = torch.stack((label_logits.view_as(known), known, new))
        torch.distributed.all_reduce(sums, group=group)
        label_logits, known, new = sums
        total = known + new
        softmax = exponentials.div_(total.unsqueeze(-1))
        odds = new / known.clamp(min=SMALLEST_SUM)
        ctx.first_new = first_new
        ctx.save_for_backward(softmax, column, is_here, weights, odds)
        return total.log() - label_logits

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of both losses, p - y + w (p - q), with the probabilities p of all tokens and q among the known
        ones: q is p (1 + odds) for a known token and 0 for a new one."""
        softmax, column, is_here, weights, odds = ctx.saved_tensors
        gradient = gradients[0]
        scaled = gradient * weights
        softmax[..., : ctx.first_new].mul_((gradient - scaled * odds).unsqueeze(-1))
        softmax[..., ctx.first_new :].mul_((gradient + scaled).unsqueeze(-1))
        at_labels = gradient.flatten().masked_fill(~is_here, 0.0)
        softmax.view(-1, softmax.shape[-1])[_rows(column), column] -= at_labels
        return softmax, None, None, None, None


def _rows(column: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(column), device=column.device)
