"""The ranks of a run, as SAVE/config.json records them, and the line that says what another number of them changes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import is_integer, read_json
from megatron_moe_lpr.training.configuration.config import TrainingConfig
from megatron_moe_lpr.training.configuration.config_file import CONFIG_FILE
from megatron_moe_lpr.training.configuration.rank_counts import micro_batches_on

NODES = "GROUP_WORLD_SIZE"
"""Environment variable of torchrun: the nodes of the run."""


def count_ranks(config: TrainingConfig, world_size: int) -> dict[str, int]:
    """Return the ranks, data-parallel size and micro-batches of a step of this start, and its nodes where known."""
    nodes = os.environ.get(NODES, "")
    return {
        "world_size": world_size,
        "data_parallel_size": config.layout.data_parallel_size(world_size),
        "num_microbatches": micro_batches_on(config, world_size),
        **({"nodes": int(nodes)} if nodes.isdecimal() else {}),
    }


def read_ranks(save: Path) -> dict[str, Any]:
    """Return what SAVE/config.json records of the ranks of the latest start; empty where there is none to read."""
    try:
        record = read_json(save / CONFIG_FILE)
    except UserError:
        return {}
    flags = record.get("config")
    batch = flags.get("global_batch_size") if isinstance(flags, dict) else None
    return {name: value for name, value in record.items() if name != "config"} | {"global_batch_size": batch}


def rank_notes(before: Mapping[str, Any], now: Mapping[str, int], global_batch_size: int) -> list[str]:
    """Return the line about the ranks of a resumed run; none where they are as many as before, or where not known.

    Args:
        before: from `read_ranks`, of the start before.
        now: from `count_ranks`.
    """
    names = ("world_size", "data_parallel_size", "num_microbatches")
    batch = before.get("global_batch_size")
    if not all(is_integer(before.get(name), low=1) for name in names) or not is_integer(batch, low=1):
        return []
    if all(before[name] == now[name] for name in names):
        return []
    ratio = now["num_microbatches"] / before["num_microbatches"]
    same = batch == global_batch_size
    return [
        f"resumes with {_ranks(now)} instead of {_ranks(before)}: DP {now['data_parallel_size']} instead of "
        f"{before['data_parallel_size']}, gradient accumulation {ratio:.3g}x ({now['num_microbatches']} micro-batches "
        f"a step instead of {before['num_microbatches']}); the global batch "
        + (f"stays {global_batch_size:,}" if same else f"is {global_batch_size:,} instead of {batch:,}")
    ]


def _ranks(counts: Mapping[str, Any]) -> str:
    ranks, nodes = counts["world_size"], counts.get("nodes")
    words = f"{ranks} {'rank' if ranks == 1 else 'ranks'}"
    return f"{words} on {nodes} {'node' if nodes == 1 else 'nodes'}" if is_integer(nodes, low=1) else words
