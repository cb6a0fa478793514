"""What a checkpoint needs: bytes on the disk, and bytes that a rank writes, which an asynchronous save holds once more
in host memory. No save needs memory of the GPU, unless new experts' weights are in FP8 (--fp8-param-gather): those are
there in bf16 as well until they are copied out.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Collection

from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.parameter_kinds import KINDS, ParameterKind
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.memory import FP32, GIB, RunSizes
from megatron_moe_lpr.planning.parameters import ParameterCounts, stage_parameters


@dataclasses.dataclass(frozen=True)
class SaveNeeds:
    """Bytes of one checkpoint, without the few kilobytes beside each tensor."""

    whole: float
    """On the disk."""
    largest_rank: float
    """Written by the rank that writes most, and held by it in host memory meanwhile, with --async-save."""
    largest_kept: float = 0.0
    """Frozen weights that a rank keeps in host memory for the whole run, in the dtype of the checkpoint."""


def save_needs(shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, trainable_only: bool = False) -> SaveNeeds:
    """What a checkpoint of a run needs; `trainable_only`: one of --save-trainable-only."""
    kinds = sizes.trains if trainable_only else frozenset(KINDS)
    stages = range(layout.pipeline_model_parallel_size)
    counts = [stage_parameters(shape, layout, stage) for stage in stages]
    whole = sum(
        count * _positions(kind, layout) * _bytes(kind, kinds, sizes)
        for stage in counts
        for kind, count in stage.items()
    )
    kept = 0.0
    if sizes.keeps_frozen and not trainable_only:
        frozen = [Counter({kind: stage[kind] for kind in stage if kind not in sizes.trains}) for stage in counts]
        kept = max(_rank_bytes(stage, layout, sizes, kinds) for stage in frozen)
    return SaveNeeds(whole, max(_rank_bytes(stage, layout, sizes, kinds) for stage in counts), kept)


def describe_needs(shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, gpus_per_node: int) -> str:
    """One line for people."""
    full, part = (save_needs(shape, layout, sizes, only) for only in (False, True))
    ranks = min(gpus_per_node, sizes.gpus)
    node = full.largest_rank * ranks
    kept = f" Frozen weights in {sizes.stored_dtype} take up to {full.largest_kept * ranks / GIB:,.1f} GiB more of it."
    return (
        f"A checkpoint of the first layout: {full.whole / GIB:,.1f} GiB on the disk ({part.whole / GIB:,.1f} with "
        f"--save-trainable-only), at most {full.largest_rank / GIB:,.2f} written by a rank. Saving takes no memory of "
        f"the GPU; with --async-save as much host memory as is written, up to {node / GIB:,.1f} GiB a node."
        + (kept if full.largest_kept else "")
    )


def _bytes(kind: ParameterKind, kinds: Collection[ParameterKind], sizes: RunSizes) -> int:
    weight = sizes.element_bytes if kind in sizes.trains else sizes.frozen_bytes
    weight = FP32 if kind == "router" else weight
    return weight * (kind in kinds) + _state_bytes(kind, sizes)


def _state_bytes(kind: ParameterKind, sizes: RunSizes) -> int:
    """AdamW's moments and, under the distributed optimizer, its own copy of the weight, also where that is fp32."""
    if kind not in sizes.trains:
        return 0
    # bf16 always trains under the distributed optimizer.
    return FP32 * (3 if sizes.distributed_optimizer or sizes.precision != "fp32" else 2)


def _positions(kind: ParameterKind, layout: ParallelLayout) -> int:
    """Ranks of a pipeline stage that hold different parts of the parameters of a kind."""
    if kind in ("new experts", "earlier experts"):
        return layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    return 1 if kind in ("router", "norm") else layout.tensor_model_parallel_size


def _rank_bytes(
    counts: ParameterCounts, layout: ParallelLayout, sizes: RunSizes, kinds: Collection[ParameterKind]
) -> float:
    """Weights are shared among the ranks of a data-parallel group that hold the same ones, and each rank of the group
    writes its part of the optimizer's state."""
    ranks = sizes.gpus // layout.pipeline_model_parallel_size
    expert_ranks = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    total = 0.0
    for kind, count in counts.items():
        holders = owners = ranks // layout.tensor_model_parallel_size
        if kind in ("new experts", "earlier experts"):
            # Of one data-parallel group; ranks that differ in TP only hold the same experts, and write nothing.
            holders = ranks // math.lcm(layout.tensor_model_parallel_size, expert_ranks)
            owners = ranks // expert_ranks
        state = _state_bytes(kind, sizes)
        total += count * (_bytes(kind, kinds, sizes) - state) / holders
        total += count * state / (owners if sizes.distributed_optimizer else holders)
    return total
