"""Time of a training step on paper: operations at an assumed speed, sent bytes at the speed of the wires.

Nothing here was ever measured. Latencies are left out, so that small messages take longer, and so is whatever else
travels over the same wires.
"""

import dataclasses

from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.flops import training_flops_per_token
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.activations import Recompute
from megatron_moe_lpr.planning.communication import busiest_rank
from megatron_moe_lpr.planning.moe_traffic import placement
from megatron_moe_lpr.planning.routing import Routing
from megatron_moe_lpr.planning.search import recomputed_share, waiting_share
from megatron_moe_lpr.planning.sizes import RunSizes
from megatron_moe_lpr.planning.traffic import Traffic


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Speeds assumed of GPUs and wires. The defaults are NVIDIA's of an H100 SXM with InfiniBand NDR, but for the
    utilization, which is an assumption."""

    gpus_per_node: int = 8
    peak_tflops: float = 989.0
    """Of a GPU in bf16."""
    utilization: float = 0.4
    """Share of that which a step's operations reach."""
    node_bandwidth: float = 450.0
    """GB/s that a GPU sends to others of its node."""
    network_bandwidth: float = 50.0
    """GB/s that a GPU sends to other nodes."""

    def ring_seconds(self, size: float, ranks: int, stride: int) -> float:
        """A gather or a reduction, of which each rank sends `size` bytes.

        Args:
            ranks: of the group.
            stride: distance of two neighbours in it, as Megatron numbers ranks.
        """
        # A ring leaves each node once, and its bytes are spread over the network cards of all its ranks there.
        members, crosses = self._members(ranks, stride)
        rate = min(self.node_bandwidth, members * self.network_bandwidth) if crosses else self.node_bandwidth
        return size / rate / 1e9

    def exchange_seconds(self, size: float, ranks: int, stride: int) -> float:
        """An all-to-all, of which each rank sends `size` bytes, as many to each other rank."""
        members, crosses = self._members(ranks, stride)
        outside = size * (ranks - members) / (ranks - 1) if crosses else 0.0
        return max(outside / self.network_bandwidth, (size - outside) / self.node_bandwidth) / 1e9

    def neighbour_seconds(self, size: float, stride: int) -> float:
        """`size` bytes to a rank that is `stride` away."""
        return size / (self.node_bandwidth if stride < self.gpus_per_node else self.network_bandwidth) / 1e9

    def _members(self, ranks: int, stride: int) -> tuple[int, bool]:
        """Ranks of a group on one node, and whether it has more."""
        return max(1, min(ranks, self.gpus_per_node // stride)), ranks * stride > self.gpus_per_node


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Seconds of a step."""

    compute: float
    waiting: float
    """For other pipeline stages."""
    imbalance: float
    """For the EP rank whose experts have most tokens, layer by layer."""
    data: float
    """DP: gradients and parameters, the experts' included, beyond the one micro-batch's time that they overlap with."""
    tensor: float
    expert: float
    """EP and expert TP."""
    pipeline: float

    @property
    def total(self) -> float:
        """Of the step, with TP, EP and PP overlapping nothing."""
        return sum(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """The part beside the computation that takes longest, and the computation's share."""
        names = {"imbalance": "EP imbalance", "data": "DP", "tensor": "TP", "expert": "EP", "pipeline": "PP"}
        names["waiting"] = "pipeline bubble"
        longest = max(names, key=lambda name: getattr(self, name))
        share, of_longest = self.compute / self.total, getattr(self, longest) / self.total
        return f"compute {share:.0%}" + (f", {names[longest]} {of_longest:.0%}" if of_longest >= 0.005 else "")


def step_times(
    shape: ModelShape,
    layout: ParallelLayout,
    sizes: RunSizes,
    recompute: Recompute,
    routing: Routing,
    hardware: Hardware,
    inside: bool = False,
) -> StepTimes:
    """Of the pipeline stage that sends most, with the original expert outside or inside the EP group."""
    traffic = busiest_rank(shape, layout, sizes, recompute, routing, inside)
    tokens = sizes.global_batch_size * sizes.seq_length / sizes.gpus
    flops = training_flops_per_token(shape, sizes.trains, sizes.seq_length)
    rate = hardware.peak_tflops * 1e12 * hardware.utilization
    compute = tokens * flops * (1 + recomputed_share(shape, sizes, recompute)) / rate
    data = _data_seconds(layout, sizes, traffic, hardware)
    return StepTimes(
        compute=compute,
        waiting=compute * waiting_share(shape, layout, sizes),
        imbalance=tokens * _flops_of_surplus(shape, layout, sizes, routing, inside) / rate,
        data=max(0.0, data - compute / sizes.num_microbatches(layout)),
        tensor=hardware.ring_seconds(traffic.tensor, layout.tensor_model_parallel_size, 1),
        expert=hardware.exchange_seconds(
            traffic.expert, layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
        )
        + hardware.ring_seconds(traffic.expert_tensor, layout.expert_tensor_parallel_size, 1),
        pipeline=hardware.neighbour_seconds(traffic.pipeline, sizes.gpus // layout.pipeline_model_parallel_size),
    )


def _data_seconds(layout: ParallelLayout, sizes: RunSizes, traffic: Traffic, hardware: Hardware) -> float:
    ranks = sizes.gpus // layout.pipeline_model_parallel_size
    total = 0.0
    experts = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    for size, stride in ((traffic.data, layout.tensor_model_parallel_size), (traffic.expert_data, experts)):
        total += hardware.ring_seconds(size, ranks // stride, stride)
    return total


def _flops_of_surplus(
    shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, routing: Routing, inside: bool
) -> float:
    """Operations a token that the busiest EP rank of each layer has beyond the average one."""
    matrices = 3 * shape.architecture.hidden_size * shape.architecture.ffn_hidden_size
    layers = (layer for layer, experts in enumerate(shape.experts_per_layer) if experts > 1)
    surplus = sum(_surplus(shape, layout, sizes, layer, routing, inside) for layer in layers)
    return 2 * matrices * surplus


def _surplus(
    shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, layer: int, routing: Routing, inside: bool
) -> float:
    """Of one layer, in products of a token with an expert's matrices: three where they train, else two."""
    groups = shape.expert_groups(layer)
    trained = ["original expert", *["earlier experts"] * sum(groups[:-1]), *["new experts"] * groups[-1]]
    shares = routing.shares(shape, layer)
    work = [share * (3 if kind in sizes.trains else 2) for share, kind in zip(shares, trained, strict=True)]
    most = max(sum(work[expert] for expert in experts) for experts in placement(shape, layout, layer, inside))
    own = 0.0 if inside else work[0]
    return own + layout.expert_model_parallel_size * most - sum(work)
