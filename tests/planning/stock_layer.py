"""Megatron's own MoE layer, with the original expert as one of its experts, in a rank of a pool: what it sends."""

import torch
from megatron.core import parallel_state
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_moe_lpr.model.configuration.config import ComputeOptions, transformer_config
from megatron_moe_lpr.model.moe.grouped_linear import ColumnParallelGroupedLinear, RowParallelGroupedLinear
from megatron_moe_lpr.model.moe.router import LPRRouter
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.moe_traffic import moe_layer
from megatron_moe_lpr.planning.routing import Routing
from megatron_moe_lpr.planning.sizes import RunSizes
from megatron_moe_lpr.planning.traffic import Passes
from megatron_moe_lpr.platform import select_platform
from megatron_moe_lpr.training.configuration.stages import STAGES
from tests.planning.counted_step import CHOICES, MICRO_BATCH, Case, chosen
from tests.planning.traffic import counted

EXPERTS, SEQUENCE = 4, 32
FEWER = CHOICES.clamp(max=EXPERTS - 1)


def sent_and_planned(layout_fields: dict[str, int]) -> tuple[dict[str, float], dict[str, float]]:
    """On every rank: bytes by kind of a forward and a backward pass, and those of the plan."""
    layout, platform = ParallelLayout(**layout_fields), select_platform("cpu")
    initialize_parallel(platform, layout)
    shape = Case(experts=(EXPERTS,)).shape
    config = transformer_config(Case(experts=(5,)).shape, ParallelLayout(), platform, ComputeOptions())
    config.num_moe_experts, config.expert_model_parallel_size = EXPERTS, layout.expert_model_parallel_size
    grouped = MLPSubmodules(linear_fc1=ColumnParallelGroupedLinear, linear_fc2=RowParallelGroupedLinear)
    experts = ModuleSpec(module=TEGroupedMLP, submodules=grouped)
    layer = MoELayer(config, MoESubmodules(experts=experts, router=LPRRouter))
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    layer.router.routing = chosen(layer.router.routing, FEWER)
    with counted() as sent:
        hidden = torch.randn(SEQUENCE, MICRO_BATCH, shape.architecture.hidden_size, requires_grad=True)
        layer(hidden)[0].sum().backward()
    sizes = RunSizes(STAGES["1"].trains, 2, SEQUENCE, MICRO_BATCH, precision="fp32")
    routing = Routing((tuple(FEWER.flatten().bincount().div(len(FEWER)).tolist()),))
    rank = parallel_state.get_expert_model_parallel_rank()
    planned = moe_layer(shape, layout, sizes, Passes(), routing, 0, rank, inside=True)
    return dict(sent), {name: size for name, size in vars(planned).items() if size}
