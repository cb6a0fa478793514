"""Weights that are kept in FP8 start from what the checkpoint says, unrounded."""

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper

from megatron_moe_lpr.checkpoint.loading import model_state
from megatron_moe_lpr.checkpoint.loading.distributed_loading import LoadStrategy


def test_megatron_is_asked_for_unrounded_weights(cpu_platform):
    """From 0.19 on it rounds them while it reads, unless it is told not to (serialization.py `load`)."""
    strategy = LoadStrategy()
    shared = FullyParallelLoadStrategyWrapper(strategy, torch.distributed.group.WORLD)
    assert not any(getattr(one, "stream_ckpt_dequant", False) for one in (strategy, shared))


def test_a_rounded_weight_is_noticed(monkeypatch):
    """Else the optimizer would start from it and save it, without a word."""
    chunk = torch.nn.Linear(2, 2, bias=False)
    monkeypatch.setattr(model_state, "unwrap", lambda module: module)
    rounded = {id(chunk.weight)}
    monkeypatch.setattr(model_state, "is_float8tensor", lambda tensor: id(tensor) in rounded)
    loaded = torch.randn(2, 2)
    model_state._keep_unrounded(chunk, {"weight": loaded})
    assert torch.equal(chunk.weight.get_high_precision_init_val(), loaded)
    rounded.add(id(loaded))
    with pytest.raises(TypeError, match="weight: megatron-core has rounded the loaded weight to FP8"):
        model_state._keep_unrounded(chunk, {"weight": loaded})
