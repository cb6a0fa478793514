"""Size of a checkpoint: bytes on the disk, and bytes that a rank writes, which an asynchronous save holds once more in
host memory. No save needs GPU memory, with two exceptions, until the copy to the host is made. New experts' weights in
FP8 (--fp8-param-gather) are converted to bf16 on the GPU. Under --use-precision-aware-optimizer the fp32 weights are
put together there, and Transformer Engine's FusedAdam casts moments in bf16 to fp32 while it describes its state.
"""

import dataclasses
from collections import Counter
from collections.abc import Collection

from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.model.parameter_counts import ParameterCounts
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.memory import GIB
from megatron_moe_lpr.planning.optimizer_states import moments_size
from megatron_moe_lpr.planning.parameters import rank_parameters
from megatron_moe_lpr.planning.planned_run import PlannedRun
from megatron_moe_lpr.planning.sizes import FP32, RunSizes


@dataclasses.dataclass(frozen=True)
class SaveNeeds:
    """Bytes of one checkpoint, without the few kilobytes beside each tensor."""

    whole: float
    """On the disk."""
    largest_rank: float
    """Written by the rank that writes most, and held by it in host memory meanwhile, with --async-save."""
    largest_kept: float = 0.0
    """Frozen weights that a rank keeps in host memory for the whole run, in the dtype of the checkpoint."""


def save_needs(run: PlannedRun, trainable_only: bool = False) -> SaveNeeds:
    """What a checkpoint of a run needs; `trainable_only`: a checkpoint of --save-trainable-only."""
    sizes, layout = run.sizes, run.layout
    saved = sizes.trains if trainable_only else frozenset(ParameterKind)
    counts = [rank_parameters(run.shape, layout, pipeline_rank) for pipeline_rank in run.pipeline_ranks]
    whole = sum(
        count * _parts(kind, layout) * _bytes(kind, saved, sizes)
        for pipeline_rank in counts
        for kind, count in pipeline_rank.items()
    )
    kept = 0.0
    if sizes.keeps_frozen and not trainable_only:
        frozen = [Counter({kind: part[kind] for kind in part if kind not in sizes.trains}) for part in counts]
        kept = max(_rank_bytes(part, layout, sizes, saved) for part in frozen)
    return SaveNeeds(whole, max(_rank_bytes(part, layout, sizes, saved) for part in counts), kept)


def describe_needs(run: PlannedRun, gpus_per_node: int) -> str:
    """One line for people."""
    full, part = save_needs(run), save_needs(run, trainable_only=True)
    ranks = min(gpus_per_node, run.sizes.gpus)
    node, dtype = full.largest_rank * ranks, run.sizes.stored_dtype
    kept = f" Frozen weights in {dtype} take up to {full.largest_kept * ranks / GIB:,.1f} GiB more of it."
    return (
        f"A checkpoint of the first layout: {full.whole / GIB:,.1f} GiB on the disk ({part.whole / GIB:,.1f} with "
        f"--save-trainable-only), at most {full.largest_rank / GIB:,.2f} written by a rank. Saving takes no memory of "
        f"the GPU; with --async-save as much host memory as is written, up to {node / GIB:,.1f} GiB a node."
        + (kept if full.largest_kept else "")
    )


def _bytes(kind: ParameterKind, saved: Collection[ParameterKind], sizes: RunSizes) -> int:
    """Bytes of one parameter in a checkpoint that has the weights of the kinds `saved`, optimizer state included."""
    weight = sizes.element_bytes if kind in sizes.trains else sizes.frozen_bytes
    weight = FP32 if kind.is_router else weight
    return weight * (kind in saved) + _state_bytes(kind, sizes)


def _state_bytes(kind: ParameterKind, sizes: RunSizes) -> int:
    """Bytes of one parameter's AdamW moments and, under the distributed optimizer, of its own copy of the weight,
    which it saves even where the weight is fp32 itself."""
    if kind not in sizes.trains:
        return 0
    # bf16 always trains under the distributed optimizer.
    copied = sizes.distributed_optimizer or sizes.precision != "fp32"
    return moments_size(sizes) + (FP32 if copied else 0)


def _parts(kind: ParameterKind, layout: ParallelLayout) -> int:
    """Ranks of a pipeline rank that hold different parts of the parameters of a kind."""
    if kind.is_expert_parallel:
        return layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    return 1 if kind.is_router or kind is ParameterKind.NORM else layout.tensor_model_parallel_size


def _rank_bytes(
    counts: ParameterCounts, layout: ParallelLayout, sizes: RunSizes, saved: Collection[ParameterKind]
) -> float:
    """Bytes that a rank writes: each of the ranks that hold the same weights writes an equal part of them, and its own
    part of the optimizer's state."""
    ranks = sizes.gpus // layout.pipeline_model_parallel_size
    expert_ranks = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    total = 0.0
    for kind, count in counts.items():
        writers = ranks // (expert_ranks if kind.is_expert_parallel else layout.tensor_model_parallel_size)
        total += count * _bytes(kind, saved, sizes) / writers
    return total
