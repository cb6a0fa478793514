"""Megatron's own MoE layer, with the original expert as one of its experts, in a rank of a pool: what it sends."""

from unittest.mock import patch

import torch
from megatron.core import parallel_state
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.config import transformer_config
from megatron_moe_lpr.model.moe.grouped_linear import ColumnParallelGroupedLinear, RowParallelGroupedLinear
from megatron_moe_lpr.model.moe.router import LPRRouter
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.moe_traffic import moe_layer_traffic
from megatron_moe_lpr.planning.planned_run import PlannedLayer, PlannedRun
from megatron_moe_lpr.planning.routing import Routing
from megatron_moe_lpr.planning.sizes import RunSizes
from megatron_moe_lpr.planning.traffic import Passes
from megatron_moe_lpr.platform import select_platform
from megatron_moe_lpr.training.configuration.stages import STAGES
from tests.planning.counted_step import CHOICES, MICRO_BATCH, Case, chosen
from tests.planning.traffic import counted

EXPERTS, SEQUENCE = 4, 32


class RouterOfTwo(LPRRouter):
    """Returns what Megatron's layer expects of its router: weights and choices."""

    def forward(self, *inputs: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """See `LPRRouter.forward`."""
        weights, choices, _ = super().forward(*inputs)
        return weights, choices


FEWER = CHOICES.clamp(max=EXPERTS - 1)


def rows_on_host(rows: object, as_numpy: bool = False, **_: object) -> object:
    """`maybe_move_tensor_to_cpu` of tensors that are there."""
    return rows.numpy() if as_numpy and torch.is_tensor(rows) else rows


def sent_and_planned(layout_fields: dict[str, int]) -> tuple[dict[str, float], dict[str, float]]:
    """On every rank: bytes by kind of a forward and a backward pass, and those of the plan."""
    layout, platform = ParallelLayout(**layout_fields), select_platform("cpu")
    initialize_parallel(platform, layout)
    shape = Case(experts=(EXPERTS,)).shape
    config = transformer_config(Case(experts=(5,)).shape, ParallelLayout(), platform, ComputeOptions())
    config.num_moe_experts, config.expert_model_parallel_size = EXPERTS, layout.expert_model_parallel_size
    grouped = MLPSubmodules(linear_fc1=ColumnParallelGroupedLinear, linear_fc2=RowParallelGroupedLinear)
    experts = ModuleSpec(module=TEGroupedMLP, submodules=grouped)
    layer = MoELayer(config, MoESubmodules(experts=experts, router=RouterOfTwo))
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    layer.router.routing = chosen(layer.router.routing, FEWER)
    # Megatron's dispatcher expects numbers of rows in numpy, and leaves tensors that are on the host as they are.
    on_host = patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", rows_on_host)
    with counted() as sent, on_host:
        hidden = torch.randn(SEQUENCE, MICRO_BATCH, shape.architecture.hidden_size, requires_grad=True)
        layer(hidden)[0].sum().backward()
    sizes = RunSizes(STAGES["1"].trains, 2, SEQUENCE, MICRO_BATCH, precision="fp32")
    routing = Routing((tuple(FEWER.flatten().bincount().div(len(FEWER)).tolist()),))
    rank = parallel_state.get_expert_model_parallel_rank()
    planned_layer = PlannedLayer(PlannedRun(shape, layout, sizes), 0)
    planned = moe_layer_traffic(planned_layer, Passes(), routing, rank, original_in_ep_group=True)
    return dict(sent), {name: size for name, size in vars(planned).items() if size}
