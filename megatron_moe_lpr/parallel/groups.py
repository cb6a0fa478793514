"""Process groups: torch.distributed's world, and Megatron's groups in it."""

import datetime
import gc
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed.rendezvous import rendezvous

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import Platform

MOST_PORTS = 65535


def initialize_parallel(
    platform: Platform, layout: ParallelLayout, seed: int = 1234, timeout_minutes: int = 10
) -> None:
    """Join the world that torchrun's environment describes (or make a world of this process) and make Megatron's groups
    for `layout`. Another call with another layout replaces the groups.

    Raises:
        UserError: the world does not split into `layout`.
    """
    _silence_dependencies()
    if not dist.is_initialized():
        _join_world(platform, datetime.timedelta(minutes=timeout_minutes))
    layout.check_world(dist.get_world_size())
    _destroy_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=platform.on_gpus,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _silence_dependencies() -> None:
    """Ignore torch's deprecation warnings about Megatron-Core 0.16, which a user cannot change, on every rank."""
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf Tensor")


def destroy_parallel() -> None:
    """Destroy Megatron's groups and the world."""
    _destroy_groups()
    if dist.is_initialized():
        dist.destroy_process_group()


def _destroy_groups() -> None:
    """Destroy Megatron's groups, which it only forgets: threads and connections would pile up with each new layout.

    Megatron itself destroys the gloo groups that it makes beside NCCL's (parallel_state.py `destroy_model_parallel`),
    and destroying a group twice is an error.
    """
    gc.collect()  # models of the old layout refer to its groups, in reference cycles
    groups = parallel_state._global_process_group_list or []
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    for group in groups:
        if group not in (None, dist.GroupMember.NON_GROUP_MEMBER) and _exists(group):
            dist.destroy_process_group(group)


def _exists(group: dist.ProcessGroup) -> bool:
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError):
        return False
    return True


def _join_world(platform: Platform, timeout: datetime.timedelta) -> None:
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        device = platform.device if platform.on_gpus else None
        _check_world()
        try:
            dist.init_process_group(platform.backend, timeout=timeout, device_id=device, **_restart_arguments())
        except dist.DistError as error:
            place = f"MASTER_ADDR {os.environ.get('MASTER_ADDR')} MASTER_PORT {os.environ.get('MASTER_PORT')}"
            raise UserError(f"{place}: the ranks cannot meet there ({str(error).splitlines()[0]})") from error
    else:
        dist.init_process_group(platform.backend, rank=0, world_size=1, store=dist.HashStore(), timeout=timeout)


def _restart_arguments() -> dict[str, Any]:
    """Arguments of `init_process_group` after torchrun has restarted the ranks of one node.

    The rendezvous store is that of the start before, which holds the addresses of ranks that have ended: a prefix of
    the restart's number keeps the new addresses apart. Several nodes may count restarts differently: they need
    torchrun's c10d rendezvous, whose store is new each time.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if count == "0" or os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        return {}
    store, rank, world_size = next(rendezvous("env://"))
    return {"store": dist.PrefixStore(f"restart_{count}", store), "rank": rank, "world_size": world_size}


def _check_world() -> None:
    """Check the environment variables that a launcher other than torchrun may set wrong."""
    numbers = {}
    if not os.environ.get("MASTER_ADDR"):
        raise UserError("environment variable MASTER_ADDR is not set; start with torchrun")
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        text = os.environ.get(name, "")
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise UserError(f"environment variable {name}={text}: a whole number is expected; start with torchrun")
        numbers[name] = int(text)
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise UserError(
            f"environment variable RANK={numbers['RANK']}: must be below WORLD_SIZE={numbers['WORLD_SIZE']}"
        )
    if not 1 <= numbers["MASTER_PORT"] <= MOST_PORTS:
        raise UserError(f"environment variable MASTER_PORT={numbers['MASTER_PORT']}: must be from 1 to {MOST_PORTS}")
