"""Frozen and trained experts behind one dispatcher: what a layer keeps for its backward pass."""

import dataclasses

import pytest
import torch

from megatron_moe_lpr.model.build import build_model
from megatron_moe_lpr.model.configuration.architecture import read_architecture
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.config import ModelShape, transformer_config
from megatron_moe_lpr.model.moe.expert_groups import ExpertGroups
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from megatron_moe_lpr.training.configuration.stages import STAGES, freeze
from tests.distributed import rank_pool
from tests.fuzzing.targets import DENSE

SHAPE = ModelShape(read_architecture(DENSE, "config"), (7, 7), 2, expansions=((4, 4), (2, 2)))
COUNTS = [5, 6, 7, 8, 1, 2]
"""Rows of the four earlier experts and of the two latest ones."""


def kept_rows(stage: str) -> int:
    """Rows of the input whose memory a layer's experts keep."""
    platform, layout = select_platform("cpu"), ParallelLayout()
    initialize_parallel(platform, layout)
    shape = dataclasses.replace(SHAPE, architecture=dataclasses.replace(SHAPE.architecture, num_layers=2))
    chunks = build_model(shape, transformer_config(shape, layout, platform, ComputeOptions()), platform)
    freeze(chunks, STAGES[stage])
    experts = next(module for module in chunks[0].modules() if isinstance(module, ExpertGroups))
    hidden = shape.architecture.hidden_size
    rows = torch.zeros(sum(COUNTS), hidden, requires_grad=True) + 0.0
    weights = {weight.untyped_storage().data_ptr() for weight in experts.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape[1:] == (hidden,):
            kept[storage.data_ptr()] = storage.nbytes() // (4 * hidden)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts(rows, torch.tensor(COUNTS), torch.ones(sum(COUNTS)))
    return sum(kept.values())


@pytest.mark.parametrize(("stage", "rows"), [("1", 3), ("2", 0), ("full", sum(COUNTS))])
def test_rows_of_frozen_experts_are_not_kept(stage, rows):
    assert rank_pool(1).run(kept_rows, stage) == [rows]
