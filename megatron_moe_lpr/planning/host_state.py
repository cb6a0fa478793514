"""The optimizer on the host (--optimizer-cpu-offload): host memory, and bytes that cross the bus in a step."""

import dataclasses

from megatron_moe_lpr.model.parameter_counts import ParameterCounts
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.memory import GIB, holders
from megatron_moe_lpr.planning.optimizer_states import gradient_size, weight_size
from megatron_moe_lpr.planning.parameters import rank_parameters
from megatron_moe_lpr.planning.planned_run import PlannedRun
from megatron_moe_lpr.planning.sizes import FP32, RunSizes


@dataclasses.dataclass(frozen=True)
class HostState:
    """Bytes of one rank."""

    state: float
    """fp32 weights and moments in host memory."""
    gradients: float
    """fp32 gradients there, in pinned memory."""
    to_host: float
    """Gradients copied in a step, in the format of their buffer: the host converts them."""
    to_device: float
    """Weights copied back in a step, in the model's format."""


def host_state(counts: ParameterCounts, layout: ParallelLayout, sizes: RunSizes) -> HostState:
    """What a rank with these parameters keeps on the host and copies in each step."""
    shares = {kind: counts[kind] / holders(kind, layout, sizes) for kind in sizes.trains if counts[kind]}
    return HostState(
        state=3 * FP32 * sum(shares.values()),
        gradients=FP32 * sum(shares.values()),
        to_host=sum(gradient_size(kind, sizes) * share for kind, share in shares.items()),
        to_device=sum(weight_size(kind, sizes) * share for kind, share in shares.items()),
    )


def describe_host_state(run: PlannedRun, gpus_per_node: int) -> str:
    """One line for people, of the rank that keeps most."""
    ranks = (rank_parameters(run.shape, run.layout, pipeline_rank) for pipeline_rank in run.pipeline_ranks)
    most = max((host_state(counts, run.layout, run.sizes) for counts in ranks), key=lambda rank: rank.state)
    kept, node = most.state + most.gradients, min(gpus_per_node, run.sizes.gpus)
    return (
        f"--optimizer-cpu-offload: {kept / GIB:,.2f} GiB of host memory a rank, up to {kept * node / GIB:,.1f} a node. "
        f"In each step a rank copies {most.to_host / 1e9:,.2f} GB to the host and {most.to_device / 1e9:,.2f} GB back, "
        "which the estimated step time leaves out."
    )
