"""The LM loss with the new-token loss in its gradient, against closed forms in float64."""

import pytest
import torch
from megatron.core import parallel_state

from megatron_moe_lpr.model.new_token_loss import CrossEntropyWithNewTokenLoss
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from tests.distributed import rank_pool

TOKENS, KNOWN, NEW = (3, 4), 8, 4
"""Shape of the tokens; columns of each kind on all ranks."""


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Logits in the order of token ids, next tokens, weights of the new-token loss, and gradients of the losses."""
    generator = torch.Generator().manual_seed(5)
    logits = (2 * torch.randn(*TOKENS, KNOWN + NEW, generator=generator)).to(dtype)
    logits[0, 0, KNOWN:] += 200  # nothing is left for known tokens in fp32
    logits[0, 1, KNOWN:] -= 200
    labels = torch.randint(0, KNOWN + NEW, TOKENS, generator=generator)
    labels[0] %= KNOWN
    weights = torch.rand(TOKENS, generator=generator) * (labels < KNOWN)
    weights[1, ::2] = 0
    return logits, labels, weights, torch.rand(TOKENS, generator=generator)


def reference(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and gradient by float64 autograd of the definition."""
    logits, labels, weights, gradient = inputs(dtype)
    logits = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(TOKENS)
    probability = logits.log_softmax(-1)
    new_token_loss = -probability[..., :KNOWN].logsumexp(-1)
    ((losses + weights * new_token_loss) * gradient).sum().backward()
    return losses.detach(), logits.grad


def computed(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """On every rank: losses, and gradient of this rank's known and new columns."""
    group = parallel_state.get_tensor_model_parallel_group()
    rank, ranks = group.rank(), group.size()
    logits, labels, weights, gradient = inputs(dtype)
    known, new = KNOWN // ranks, NEW // ranks
    parts = logits[..., :KNOWN].split(known, -1)[rank], logits[..., KNOWN:].split(new, -1)[rank]
    own = torch.cat(parts, -1).requires_grad_()
    row = torch.where(labels < KNOWN, labels, labels - KNOWN)
    size = torch.where(labels < KNOWN, known, new)
    columns = row // size * (known + new) + row % size + known * (labels >= KNOWN)
    losses = CrossEntropyWithNewTokenLoss.apply(own.clone(), columns, weights, known, group)
    losses.backward(gradient)
    return losses.detach(), own.grad


def on_ranks(ranks: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    initialize_parallel(select_platform("cpu"), ParallelLayout(tensor_model_parallel_size=ranks))
    return computed(dtype)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
def test_losses_and_gradient_equal_the_closed_form(ranks, dtype, tolerance):
    losses, gradient = reference(dtype)
    found = rank_pool(ranks).run(on_ranks, ranks, dtype)
    known = torch.cat([own[..., : KNOWN // ranks] for _, own in found], -1)
    new = torch.cat([own[..., KNOWN // ranks :] for _, own in found], -1)
    gradients = torch.cat((known, new), -1).double()
    # Where fp32 leaves nothing for the known tokens, only the new ones' gradient is exact; no value is infinite.
    gradient[0, 0, :KNOWN], gradients[0, 0, :KNOWN] = 0, gradients[0, 0, :KNOWN].nan_to_num(7, 7, 7) * 0
    assert torch.allclose(gradients, gradient, rtol=tolerance, atol=tolerance / 10)
    for one, _ in found:
        assert torch.allclose(one.double(), losses, rtol=1e-6, atol=1e-6)
