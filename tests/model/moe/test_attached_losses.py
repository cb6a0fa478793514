"""What torch compiles on GPUs: without a break, to the numbers of the plain functions (those: test_router.py)."""

import pytest
import torch

from megatron_moe_lpr.model.moe.attached_losses import add_loss_gradients
from megatron_moe_lpr.model.moe.weighted_rows import weigh, weigh_backward

TOKENS, EXPERTS = 7, 5


def compiled(function):
    """To one graph of torch's operations, which are run as they are: compiling further would need a compiler."""
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(
    ("load", "allowed", "coefficients"),
    [(True, False, (0.01, 0.0)), (False, False, (0.0, 0.1)), (True, True, (0.01, 0.1))],
)
def test_loss_gradients_compile_to_one_graph(load, allowed, coefficients):
    given = (
        torch.randn(TOKENS, EXPERTS),
        torch.randn(TOKENS, EXPERTS),
        torch.rand(TOKENS, 4),
        torch.full((1,), 3.0),
        torch.rand(EXPERTS) if load else None,
        torch.arange(TOKENS) % EXPERTS + 1 if allowed else None,
        *coefficients,
        "paper",
    )
    torch.testing.assert_close(compiled(add_loss_gradients)(*given), add_loss_gradients(*given))


def test_weighting_compiles_to_one_graph():
    rows, weights = torch.randn(TOKENS, 4).bfloat16(), torch.rand(TOKENS)
    for function, given in ((weigh, (rows, weights)), (weigh_backward, (rows, rows + 1, weights))):
        torch.testing.assert_close(compiled(function)(*given), function(*given))
