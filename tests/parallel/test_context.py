"""Which tokens CP ranks compute, against Megatron's own function, and the whole sequence from the ranks' parts."""

import inspect

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_moe_lpr.parallel.context import all_tokens, own_spans, own_tokens
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from tests.distributed import rank_pool

BATCH, SEQUENCE = 3, 16


def parts(size: int) -> dict[str, torch.Tensor]:
    """On a CP rank: its tokens, here and by Megatron, the tokens between its spans, all tokens, and their gradient."""
    initialize_parallel(select_platform("cpu"), ParallelLayout(context_parallel_size=size))
    group = parallel_state.get_context_parallel_group()
    whole = torch.arange(BATCH * SEQUENCE, dtype=torch.float32).view(BATCH, SEQUENCE)
    own = own_tokens(whole, 1, group).flatten().requires_grad_()
    gathered = all_tokens(own, group, BATCH)
    # Each rank weighs a token by the token's number and its own rank + 1.
    (gathered * whole.flatten() * (group.rank() + 1)).sum().backward()
    # megatron-core 0.19 has an argument more.
    hybrid = "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters
    given = {"is_hybrid_cp": False} if hybrid else {}
    return {
        "own": own.detach(),
        "megatron": get_batch_on_this_cp_rank({"tokens": whole, "cu_seqlens": None}, **given)["tokens"].flatten(),
        "spans": torch.cat([whole.flatten()[begin:end] for begin, end in own_spans(SEQUENCE, group, BATCH)]),
        "gathered": gathered.detach(),
        "gradient": own.grad,
    }


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_every_sequence(size):
    found = rank_pool(size).run(parts, size)
    whole = torch.arange(BATCH * SEQUENCE, dtype=torch.float32)
    assert torch.equal(torch.cat([one["own"] for one in found]).sort().values, whole)
    for one in found:
        assert torch.equal(one["own"], one["megatron"]) and torch.equal(one["own"], one["spans"])
        assert torch.equal(one["gathered"], whole)
        # What all ranks' weights are together.
        assert torch.equal(one["gradient"], one["own"] * sum(range(1, size + 1)))
