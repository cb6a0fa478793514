"""Megatron's optimizer on the host (--optimizer-cpu-offload): what it lacks to resume, and to be saved.

`HybridDeviceOptimizer` keeps fp32 weights and moments in host memory, copies gradients there, steps torch's AdamW and
copies the weights back (optimizer/cpu_offloading/hybrid_optimizer.py).
"""

from collections.abc import Iterator
from typing import Any

from megatron.core.optimizer import DistributedOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_moe_lpr.megatron.overriding import replace

_build_groups = DistributedOptimizer._build_model_and_main_param_groups

CLASSES = ("cpu_optimizer_cls", "gpu_optimizer_cls")
"""Settings of a parameter group that are classes: a checkpoint holds none."""


def install() -> None:
    """Replace two methods that fail for weights that are fp32 in the model too, as routers are."""
    replace(DistributedOptimizer, _build_model_and_main_param_groups=classmethod(_build_groups_of_leaves))
    replace(HybridDeviceOptimizer, _update_fp32_params_by_new_state=_set_inner_weights)


def _build_groups_of_leaves(cls: type[DistributedOptimizer], *arguments: Any) -> tuple[list[Any], ...]:
    """Replaces DistributedOptimizer._build_model_and_main_param_groups: an fp32 weight's slice is a view that takes
    part in autograd, which torch's optimizers refuse unless it retains its gradient."""
    groups = _build_groups(*arguments)
    _, _, _, shard_fp32_groups, _ = groups
    for shard in (shard for group in shard_fp32_groups for shard in group):
        shard.retain_grad()
    return groups


def _set_inner_weights(self: HybridDeviceOptimizer) -> None:
    """Replaces HybridDeviceOptimizer._update_fp32_params_by_new_state, which looks for every weight among those that
    have an fp32 copy because they are bf16."""
    for parameter, state in self.state.items():
        self.param_to_inner_param[parameter].data.copy_(state["master_param"])


def without_classes(groups: Iterator[dict[str, Any]]) -> None:
    """Remove what no checkpoint may hold from the parameter groups of a state, in place."""
    for group in groups:
        for name in CLASSES:
            group.pop(name, None)
