"""Bytes planned against those that ranks really send in a training step: equal, for every kind and every rank."""

import pytest

from tests.distributed import rank_pool
from tests.planning import stock_layer
from tests.planning.counted_step import Case, sent_and_planned

TP2, EP2, PP2 = ({f"{name}_model_parallel_size": 2} for name in ("tensor", "expert", "pipeline"))
CP2 = {"context_parallel_size": 2}
INTERLEAVED = PP2 | {"num_virtual_stages_per_pipeline_rank": 2}
EXPERT_TP2 = {"expert_tensor_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}
OVERLAPPED = SHARDED | {"overlap_grad_reduce": True, "overlap_param_gather": True}
QK_NORM = {"model_type": "qwen3", "head_dim": 16}
TIED = {"tie_word_embeddings": True}
INSERTED = {"stage": "blocks", "experts": (1,) * 3, "inserted_blocks": (1,)}
NEW_TOKENS = {"new_tokens": (90, 60)}
EXPANDED_TWICE = {"expansions": ((2, 2), (2, 2))}

CASES = {
    "DP2": Case(),
    "DP2, distributed optimizer": Case(optimizer=SHARDED),
    "DP2, overlapped": Case(optimizer=OVERLAPPED),
    "DP2, bf16": Case(bf16=True),
    "TP2+SP": Case(TP2),
    "TP2+SP, expert TP2": Case(TP2 | EXPERT_TP2),
    "EP2": Case(EP2),
    "EP2, bf16": Case(EP2, bf16=True),
    "EP2, a dense layer first": Case(EP2, experts=(1, 5, 5)),
    "EP2, expanded twice": Case(EP2, **EXPANDED_TWICE),
    "CP2": Case(CP2),
    "CP2xEP2, recompute full, distributed optimizer": Case(CP2 | EP2, recompute="full", optimizer=SHARDED),
    "full, CP2xTP2xEP2": Case(CP2 | TP2 | EP2, stage="full", ranks=4),
    "CP2xPP2": Case(CP2 | PP2, ranks=4),
    "PP2": Case(PP2),
    "PP2 interleaved": Case(INTERLEAVED, experts=(5,) * 4),
    "TP2xEP2": Case(TP2 | EP2),
    "TP2xEP2, a dense layer first": Case(TP2 | EP2, experts=(1, 5, 5)),
    "TP2xEP2, recompute full": Case(TP2 | EP2, recompute="full"),
    "TP2xEP2, recompute moe": Case(TP2 | EP2, recompute="moe"),
    "stage 2, DP2": Case(stage="2"),
    "stage 2, DP2, distributed optimizer": Case(stage="2", optimizer=SHARDED),
    "stage 2, TP2+SP": Case(TP2, stage="2"),
    "stage 2, EP2": Case(EP2, stage="2"),
    "stage 2, PP2": Case(PP2, stage="2"),
    "stage 2, TP2xEP2": Case(TP2 | EP2, stage="2", optimizer=SHARDED),
    "full, DP2": Case(stage="full", optimizer=SHARDED),
    "full, TP2+SP": Case(TP2, stage="full"),
    "full, TP2 without SP, dense": Case(TP2 | {"sequence_parallel": False}, stage="full", experts=(1, 1)),
    "full, TP2+SP, recompute mlp, dense": Case(TP2, stage="full", experts=(1, 1), recompute="mlp"),
    "full, TP2+SP, norms of queries and keys": Case(TP2, stage="full", model=QK_NORM),
    "full, TP2 without SP, dense, norms of queries and keys": Case(
        TP2 | {"sequence_parallel": False}, stage="full", experts=(1, 1), model=QK_NORM
    ),
    "full, TP2+SP, norms of outputs and of all heads": Case(TP2, stage="full", model={"model_type": "olmo2"}),
    "TP2xEP2, norms of outputs and of all heads": Case(TP2 | EP2, model={"model_type": "olmo2"}),
    "full, TP2+SP, parallel block": Case(TP2, stage="full", model={"model_type": "cohere2"} | TIED),
    "full, PP2, tied": Case(PP2, stage="full", model=TIED),
    "full, TP2xEP2": Case(TP2 | EP2, stage="full", optimizer=SHARDED),
    "inserted blocks, DP2, distributed optimizer": Case(optimizer=SHARDED, **INSERTED),
    "inserted blocks, TP2+SP": Case(TP2, **INSERTED, model=QK_NORM),
    "inserted blocks, TP2 without SP": Case(TP2 | {"sequence_parallel": False}, **INSERTED, model=QK_NORM),
    "inserted blocks, PP2": Case(PP2, **INSERTED | {"experts": (1,) * 4}),
    "new tokens, DP2, distributed optimizer": Case(optimizer=SHARDED, **NEW_TOKENS),
    "new tokens, TP2+SP": Case(TP2, **NEW_TOKENS),
    "new tokens, TP2+SP, tied": Case(TP2, **NEW_TOKENS, model=TIED),
    "new tokens, stage 2, TP2+SP": Case(TP2, stage="2", **NEW_TOKENS),
    "new tokens, PP2": Case(PP2, **NEW_TOKENS),
    "new tokens, PP2, tied": Case(PP2, **NEW_TOKENS, model=TIED),
    "new tokens, full, PP2, tied": Case(PP2, stage="full", **NEW_TOKENS, model=TIED),
    "new tokens, TP2xEP2xPP2, tied": Case(TP2 | EP2 | PP2, ranks=4, **NEW_TOKENS, model=TIED),
    "TP2xEP2xDP2": Case(TP2 | EP2, ranks=4),
    "TP2xEP2xPP2, distributed optimizer": Case(TP2 | EP2 | PP2, ranks=4, optimizer=SHARDED),
    "EP4, bf16": Case({"expert_model_parallel_size": 4}, ranks=4, bf16=True),
    "stage 2, EP2xPP2": Case(EP2 | PP2, ranks=4, stage="2", optimizer=SHARDED),
}


@pytest.mark.parametrize("name", CASES)
def test_ranks_send_what_is_planned(name):
    for rank, (sent, planned) in enumerate(rank_pool(CASES[name].ranks).run(sent_and_planned, CASES[name])):
        assert sent == pytest.approx(planned, rel=1e-12), f"rank {rank}"


@pytest.mark.parametrize("layout", [EP2, EXPERT_TP2], ids=str)
def test_stock_layer_sends_what_is_planned_for_the_original_expert_inside(layout):
    for rank, (sent, planned) in enumerate(rank_pool(2).run(stock_layer.sent_and_planned, layout)):
        assert sent == pytest.approx(planned, rel=1e-12), f"rank {rank}"
