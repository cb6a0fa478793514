"""Time of a training step on paper: operations at an assumed speed, sent bytes at the speed of the wires.

Nothing here was ever measured. Latencies of messages are left out, so small ones take longer in reality; so is other
traffic on the same wires. A micro-batch takes as long as the GPU computes and sends, or as the host launches.
"""

import dataclasses
import math

from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.model.configuration.parameters import projection_shapes
from megatron_moe_lpr.model.flops import training_flops_per_token
from megatron_moe_lpr.planning.communication import busiest_rank
from megatron_moe_lpr.planning.launches import launching_seconds
from megatron_moe_lpr.planning.moe_traffic import placement
from megatron_moe_lpr.planning.planned_run import PlannedLayer, PlannedRun
from megatron_moe_lpr.planning.routing import Routing
from megatron_moe_lpr.planning.search import recomputed_share, waiting_share
from megatron_moe_lpr.planning.traffic import Traffic


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Assumed speeds of GPUs and wires. The defaults are NVIDIA's figures of an H100 SXM with InfiniBand NDR; only the
    utilization is this project's assumption."""

    gpus_per_node: int = 8
    peak_tflops: float = 989.0
    """TFLOP/s of a GPU in bf16."""
    utilization: float = 0.4
    """Share of `peak_tflops` that a step reaches."""
    node_bandwidth: float = 450.0
    """GB/s that a GPU sends to others of its node."""
    network_bandwidth: float = 50.0
    """GB/s that a GPU sends to other nodes."""

    def ring_seconds(self, size: float, ranks: int, stride: int) -> float:
        """Seconds of a gather or a reduction in which each rank sends `size` bytes.

        Args:
            ranks: ranks of the process group.
            stride: distance of two neighbours in the group, as Megatron numbers ranks.
        """
        # A ring leaves each node once, and its bytes are spread over the network cards of all its ranks there.
        members, crosses = self._members(ranks, stride)
        rate = min(self.node_bandwidth, members * self.network_bandwidth) if crosses else self.node_bandwidth
        return size / rate / 1e9

    def exchange_seconds(self, size: float, ranks: int, stride: int) -> float:
        """Seconds of an all-to-all in which each rank sends `size` bytes, as many to each other rank."""
        members, crosses = self._members(ranks, stride)
        outside = size * (ranks - members) / (ranks - 1) if crosses else 0.0
        return max(outside / self.network_bandwidth, (size - outside) / self.node_bandwidth) / 1e9

    def neighbour_seconds(self, size: float, stride: int) -> float:
        """Seconds to send `size` bytes to the global rank that is `stride` away."""
        return size / (self.node_bandwidth if stride < self.gpus_per_node else self.network_bandwidth) / 1e9

    def _members(self, ranks: int, stride: int) -> tuple[int, bool]:
        """Ranks of a process group on one node, and whether it spans several nodes."""
        return max(1, min(ranks, self.gpus_per_node // stride)), ranks * stride > self.gpus_per_node


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Seconds of a step."""

    compute: float
    waiting: float
    """For other pipeline ranks."""
    imbalance: float
    """For the EP rank whose experts have most tokens, layer by layer."""
    data: float
    """DP: gradients and parameters, less the time of the one micro-batch that they overlap with."""
    tensor: float
    expert: float
    """EP and expert TP."""
    pipeline: float
    context: float = 0.0
    """CP, as if nothing were computed beside it."""
    launches: float = 0.0
    """For the host, which launches for longer than the GPU computes and sends; 0: it is ahead of the GPU."""

    @property
    def total(self) -> float:
        """Seconds of the step; TP, CP, EP and PP overlap with nothing."""
        return sum(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """Share of the computation, and the part beside it that takes longest."""
        names = {"imbalance": "EP imbalance", "data": "DP", "tensor": "TP", "expert": "EP", "pipeline": "PP"}
        names |= {"waiting": "pipeline bubble", "launches": "launches", "context": "CP"}
        longest = max(names, key=lambda name: getattr(self, name))
        share, longest_share = self.compute / self.total, getattr(self, longest) / self.total
        return f"compute {share:.0%}" + (f", {names[longest]} {longest_share:.0%}" if longest_share >= 0.005 else "")


def step_times(run: PlannedRun, routing: Routing, hardware: Hardware, original_in_ep_group: bool = False) -> StepTimes:
    """Seconds of the pipeline rank that sends most (see `communication.rank_traffic` for `original_in_ep_group`)."""
    layout, sizes = run.layout, run.sizes
    traffic = busiest_rank(run, routing, original_in_ep_group)
    tokens = sizes.global_batch_size * sizes.seq_length / sizes.gpus
    flops = training_flops_per_token(run.shape, sizes.trains, sizes.seq_length)
    rate = hardware.peak_tflops * 1e12 * hardware.utilization
    compute = tokens * flops * (1 + recomputed_share(run)) / rate
    EP, ETP = layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    imbalance = tokens * _surplus_flops(run, routing, original_in_ep_group) / rate
    tensor = hardware.ring_seconds(traffic.tensor, layout.tensor_model_parallel_size, 1)
    expert = hardware.exchange_seconds(traffic.expert, EP, ETP) + hardware.ring_seconds(traffic.expert_tensor, ETP, 1)
    pipeline = hardware.neighbour_seconds(traffic.pipeline, sizes.gpus // layout.pipeline_model_parallel_size)
    context = hardware.ring_seconds(traffic.context, layout.context_parallel_size, layout.tensor_model_parallel_size)
    launches = max(0.0, launching_seconds(run) - (compute + imbalance + tensor + context + expert + pipeline))
    return StepTimes(
        compute=compute,
        waiting=(compute + launches) * waiting_share(run),
        imbalance=imbalance,
        data=max(0.0, _data_seconds(run, traffic, hardware) - (compute + launches) / run.num_microbatches),
        tensor=tensor,
        expert=expert,
        pipeline=pipeline,
        context=context,
        launches=launches,
    )


def _data_seconds(run: PlannedRun, traffic: Traffic, hardware: Hardware) -> float:
    """Reductions and gathers of both optimizers' parameters, one after the other."""
    layout = run.layout
    ranks = run.sizes.gpus // layout.pipeline_model_parallel_size
    expert_ranks = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    total = 0.0
    for size, stride in ((traffic.data, layout.tensor_model_parallel_size), (traffic.expert_data, expert_ranks)):
        total += hardware.ring_seconds(size, ranks // stride, stride)
    return total


def _surplus_flops(run: PlannedRun, routing: Routing, original_in_ep_group: bool) -> float:
    """Operations a token that the busiest EP rank of each layer has beyond the average one."""
    shape = run.shape
    if not shape.num_moe_layers:
        return 0.0
    expert = sum(map(math.prod, projection_shapes(shape.architecture)))
    layers = (PlannedLayer(run, index) for index in range(shape.architecture.num_layers))
    return 2 * expert * sum(_surplus(layer, routing, original_in_ep_group) for layer in layers if layer.is_moe)


def _surplus(layer: PlannedLayer, routing: Routing, original_in_ep_group: bool) -> float:
    """Work of the busiest EP rank of a layer beyond the average one's, in products of a token with an expert's
    matrices: forward, for the input's gradient, and where the expert trains for the weights' gradient."""
    shape, EP = layer.run.shape, layer.run.layout.expert_model_parallel_size
    expansions = shape.expert_groups(layer.index)
    kinds = [
        *[ParameterKind.ORIGINAL_EXPERT if layer.has_expert_apart else ParameterKind.BASE_EXPERTS]
        * shape.base_experts(layer.index),
        *[ParameterKind.EARLIER_EXPERTS] * sum(expansions[:-1]),
        *[ParameterKind.NEW_EXPERTS] * expansions[-1],
    ]
    shares = routing.shares(shape, layer.index)
    work = [share * (3 if kind in layer.run.sizes.trains else 2) for share, kind in zip(shares, kinds, strict=True)]
    most = max(sum(work[expert] for expert in experts) for experts in placement(layer, original_in_ep_group))
    # On every rank the original expert has the rank's own tokens only.
    own = 0.0 if original_in_ep_group or not layer.has_expert_apart else work[0]
    return own + EP * most - sum(work)
