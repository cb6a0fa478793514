"""torch's AdamW under Megatron's DistributedOptimizer, which expects Transformer Engine's or apex's.

On the CPU platform, and on GPUs with `--transformer-impl local`. Where Transformer Engine or apex is installed,
Megatron chooses its kernels at import, and they cannot read host memory. torch keeps a `step` tensor per parameter and
adds to it in place. distrib_optimizer.py of megatron-core gives all
parameters one and the same tensor on resume, fails where there is no state yet, and copies `step` like a moment.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import local_multi_tensor_applier

from megatron_moe_lpr.megatron.overriding import replace
from megatron_moe_lpr.megatron.versions import scales_by_tensors


def _steps_taken(optimizer: DistributedOptimizer) -> float:
    """Steps taken, the same on all ranks: a rank whose shard is empty has no state that holds the number."""
    steps = [float(state["step"]) for state in optimizer.optimizer.state.values() if "step" in state]
    most = torch.tensor(max(steps, default=0.0), device=torch.cuda.current_device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=optimizer.data_parallel_group)
    return most.item()


def _state_dict(self: DistributedOptimizer) -> dict[str, Any]:
    """`DistributedOptimizer.state_dict` that works before the first step too."""
    if self.is_stub_optimizer:
        return {"optimizer": {"param_groups": []}}
    inner, step = self.optimizer.state_dict(), _steps_taken(self)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in inner["param_groups"]]
    # A whole number, as Transformer Engine's kernel takes it where it continues the run.
    return {"optimizer": {"param_groups": [group | {"step": int(step)} for group in groups]}}


class FusedAdam(torch.optim.Adam):
    """torch's fused Adam: one pass over parameters, gradients and moments instead of one for each operation.

    Takes `adam_w_mode` like Transformer Engine's and apex's: Megatron builds torch's own class without `fused`.
    """

    def __init__(self, params: Any, *, adam_w_mode: bool, **kwargs: Any) -> None:
        super().__init__(params, fused=True, decoupled_weight_decay=adam_w_mode, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that torch's optimizer or Transformer Engine's has saved, whose groups have other settings."""
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        groups = [mine | loaded for mine, loaded in zip(own, state_dict["param_groups"], strict=True)]
        super().load_state_dict(state_dict | {"param_groups": groups})


def _scale(chunk_size: int, noop_flag: Any, tensor_lists: list[list[torch.Tensor]], scale: float) -> None:
    """`local_multi_tensor_scale` of megatron.core.utils without its temporary copy of all gradients; in place, as for
    clipping, in few launches."""
    sources, targets = tensor_lists
    if sources and all(source is target for source, target in zip(sources, targets, strict=True)):
        torch._foreach_mul_(targets, scale)
        return
    for source, target in zip(sources, targets, strict=True):
        torch.mul(source, scale, out=target)


def _l2_norm(
    chunk_size: int, noop_flag: Any, tensor_lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Norm of all tensors together, [1], and no norms of each; `local_multi_tensor_l2_norm` of megatron.core.utils
    without its wait for the device after every tensor."""
    (tensors,) = tensor_lists
    return torch.stack(torch._foreach_norm(tensors)).norm().view(1), None


def _choose_torch() -> None:
    """Set the names of optimizer/__init__.py, distrib_optimizer.py, optimizer.py and clip_grads.py as they are without
    Transformer Engine and apex."""
    replace(megatron_optimizer, Adam=FusedAdam, SGD=torch.optim.SGD, USING_PYTORCH_OPTIMIZER=False)
    replace(distrib_optimizer, Adam=torch.optim.Adam, HAVE_APEX_OR_TE=False)
    replace(distrib_optimizer, USING_TE_OPTIMIZER=False, USING_APEX_OPTIMIZER=False)
    for module in (clip_grads, optimizer):
        replace(module, multi_tensor_applier=local_multi_tensor_applier, multi_tensor_scale_impl=_scale)
    replace(clip_grads, l2_norm_impl=_l2_norm)
    if scales_by_tensors():
        # Transformer Engine's kernel for a norm that stays on the device.
        replace(clip_grads, multi_tensor_scale_tensor_impl=None)


def install() -> None:
    """Choose torch's optimizer, and replace the methods that copy `step`."""
    _choose_torch()
    load_state_dict = DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(load_state_dict)
    def load_with_separate_steps(self: DistributedOptimizer, state_dict: dict[str, Any]) -> None:
        if self.is_stub_optimizer:
            return
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    @functools.wraps(set_states)
    def set_all_but_step(
        self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]
    ) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        set_states(self, model_param, {"step": state["step"], **tensors} if "step" in state else tensors)

    replace(
        DistributedOptimizer,
        state_dict=_state_dict,
        load_state_dict=load_with_separate_steps,
        _set_main_param_and_optimizer_states=set_all_but_step,
    )
