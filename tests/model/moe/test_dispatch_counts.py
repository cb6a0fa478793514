"""Numbers of rows that ranks exchange, against Megatron's own sums on the device."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_moe_lpr.model.moe import dispatch_counts

EP, LOCAL, TOKENS = 2, 3, 11
SPLITS = ("input_splits", "output_splits", "output_splits_tp")


def dispatcher(rank: int, tp: int, fused: bool) -> SimpleNamespace:
    """What either function reads of a dispatcher; ranks of one EP rank lie behind each other."""
    first = LOCAL * (rank // tp)
    return SimpleNamespace(
        ep_size=EP,
        tp_size=tp,
        tp_rank=rank % tp,
        num_experts=EP * LOCAL,
        num_local_experts=LOCAL,
        local_expert_indices=[*range(first, first + LOCAL)],
        tp_ep_group=SimpleNamespace(rank=lambda: rank, size=lambda: EP * tp),
        config=SimpleNamespace(
            moe_permute_fusion=fused,
            moe_expert_capacity_factor=None,
            moe_router_padding_for_quantization=False,
            moe_router_topk=2,
        ),
        drop_and_pad=False,
        cuda_dtoh_point="",
        cuda_sync_point="",
        cuda_sync_point_priority={"": 0},
        _maybe_update_cuda_sync_point=lambda point: None,
    )


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tp", [1, 2])
def test_the_numbers_are_megatrons(tp, fused):
    generator = torch.Generator().manual_seed(4)
    choices = [torch.rand(TOKENS, EP * LOCAL, generator=generator) < 0.4 for _ in range(EP * tp)]
    table = torch.cat([chosen.sum(dim=0) for chosen in choices])
    for rank, chosen in enumerate(choices):
        ours, megatrons = dispatcher(rank, tp, fused), dispatcher(rank, tp, fused)
        gathered = {"gather_from_sequence_parallel_region": lambda counts, group: table}
        with patch.multiple(token_dispatcher, **gathered), patch.multiple(dispatch_counts, **gathered):
            expected = MoEAlltoAllTokenDispatcher.preprocess(megatrons, chosen)
            dispatch_counts.exchange_counts(ours, chosen, lambda counts: counts, lambda counts: counts)
        assert torch.equal(ours.tokens_per_expert, expected) and expected.sum() > 0
        for name in SPLITS:
            assert getattr(ours, name).tolist() == getattr(megatrons, name).tolist()
        chunks = ours.num_global_tokens_per_local_expert
        assert torch.equal(chunks, megatrons.num_global_tokens_per_local_expert) and chunks.is_contiguous()
