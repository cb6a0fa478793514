"""Which layouts a run can use on given GPUs, best first."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.config import ModelShape, check_layout
from megatron_moe_lpr.model.configuration.fp8 import check_fp8_shapes
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.model.configuration.parameters import projection_shapes
from megatron_moe_lpr.model.configuration.recompute import NOT_DELAYED, check_recompute_in_fp8
from megatron_moe_lpr.model.flops import training_flops_per_token
from megatron_moe_lpr.model.parameter_counts import count_parameters
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.launches import launching_seconds
from megatron_moe_lpr.planning.memory import GIB, RankMemory, largest_rank
from megatron_moe_lpr.planning.planned_run import PlannedRun, Recompute
from megatron_moe_lpr.planning.sizes import RunSizes

# Rules of thumb for the order, not measurements: what doubling a dimension costs inside a node, and across nodes.
COST_OF_TP, COST_OF_EP, ACROSS_NODES = 0.08, 0.05, 4.0
USABLE = 0.95
"""Share of a GPU's memory that a plan may use; the rest is for fragmentation."""

DENSE_FFN_PRODUCTS = ("mlp.linear_fc1.weight", "mlp.linear_fc2.weight")


@dataclasses.dataclass(frozen=True)
class Machine:
    """The GPUs of a run."""

    gpus: int
    gpus_per_node: int
    gpu_memory: float
    """GiB of one GPU."""
    flops: float = 0.4 * 989e12
    """Operations a second that a GPU reaches; the default is that of `interconnect.Hardware`."""

    @property
    def usable_bytes(self) -> float:
        """Bytes of one GPU that a plan may use."""
        return self.gpu_memory * GIB * USABLE


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layout that the model and the batch split into, with a recompute mode."""

    layout: ParallelLayout
    recompute: Recompute
    memory: RankMemory
    cost: float
    """Expected time of a step; 1: nothing is recomputed, communicated or waited for, also not for launches."""
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Values to try for each parallel dimension and for recompute; empty: all that make sense. CP is not searched."""

    tensor: Sequence[int] = ()
    pipeline: Sequence[int] = ()
    expert: Sequence[int] = ()
    recompute: Sequence[Recompute] = ()
    context: int = 1

    def layouts(self, shape: ModelShape, machine: Machine) -> Iterator[ParallelLayout]:
        """Every combination, whether it splits or not."""
        shared = [count for layer in range(shape.architecture.num_layers) for count in _spread(shape, layer)]
        tensor = self.tensor or [size for size in (1, 2, 4, 8, 16) if size <= machine.gpus_per_node]
        pipeline = self.pipeline or _divisors(shape.architecture.num_layers, machine.gpus)
        expert = self.expert or (_divisors(math.gcd(*shared), machine.gpus) if shared else [1])
        for tp, pp, ep in itertools.product(tensor, pipeline, expert):
            yield ParallelLayout(tp, pp, expert_model_parallel_size=ep, context_parallel_size=self.context)


def find_layouts(shape: ModelShape, sizes: RunSizes, machine: Machine, choice: Choice) -> list[Candidate]:
    """Layouts that the model and the batch split into and that fit into memory, best first.

    Raises:
        UserError: none splits (the reason of the first tried) or none fits (what the smallest needs).
    """
    candidates: list[Candidate] = []
    refused: list[UserError] = []
    modes = choice.recompute or _modes_to_try(shape, sizes)
    if sizes.precision == "fp8":
        check_recompute_in_fp8(modes, sizes.fp8_recipe, "--recompute")
    for layout in choice.layouts(shape, machine):
        try:
            check_splits(shape, layout, sizes)
        except UserError as error:
            refused.append(error)
            continue
        candidates += [evaluate(PlannedRun(shape, layout, sizes, recompute), machine) for recompute in modes]
    if not candidates:
        raise refused[0]
    fitting = [candidate for candidate in candidates if candidate.memory.total <= machine.usable_bytes]
    if not fitting:
        raise UserError(_nothing_fits(candidates, machine))
    return sorted(_cheapest(fitting), key=lambda candidate: (candidate.cost, candidate.memory.total))


def check_splits(shape: ModelShape, layout: ParallelLayout, sizes: RunSizes) -> None:
    """Check that ranks, model, sequence and batch split into a layout.

    Raises:
        UserError: naming the numbers that do not.
    """
    layout.check_world(sizes.gpus)
    check_layout(shape, layout)
    layout.check_sequence(sizes.seq_length)
    check_fp8_shapes(sizes.fp8, shape.architecture, layout, sizes.micro_batch_size * sizes.seq_length)
    sizes.num_microbatches(layout)


def _modes_to_try(shape: ModelShape, sizes: RunSizes) -> Sequence[Recompute]:
    """Recompute modes without `core_attn`, which saves nothing with fused attention, and `layernorm`, which saves
    little."""
    if shape.num_moe_layers == 0:
        return ("none", "mlp", "full")
    modes: tuple[Recompute, ...] = ("none", "moe_act", "moe", "full")
    delayed = sizes.precision == "fp8" and sizes.fp8_recipe == "delayed"
    return tuple(mode for mode in modes if not (delayed and mode in NOT_DELAYED))


def evaluate(run: PlannedRun, machine: Machine) -> Candidate:
    """Memory and expected cost of one layout."""
    memory = largest_rank(run)
    TP, EP = run.layout.tensor_model_parallel_size, run.layout.expert_model_parallel_size
    waiting, recomputed, launches = waiting_share(run), recomputed_share(run), launching_share(run, machine)
    tp_cost = COST_OF_TP * math.log2(TP)
    ep_cost = COST_OF_EP * math.log2(EP) * (ACROSS_NODES if max(TP, EP) > machine.gpus_per_node else 1)
    # What the GPU computes and sends, or what the host launches where that takes longer.
    cost = max((1 + recomputed) * (1 + tp_cost + ep_cost), launches) * (1 + waiting)
    reasons = [f"{(machine.usable_bytes - memory.total) / GIB:.0f} GiB free"]
    nothing, recompute = run.recompute == "none", f"recompute {run.recompute} +{recomputed:.0%}"
    reasons += ["nothing recomputed" if nothing else recompute]
    reasons += [f"pipeline bubble +{waiting:.0%}"] if waiting else []
    reasons += [f"launches take {launches:.1f} times the computation"] if launches > 1 + recomputed else []
    reasons += [f"TP communication +{tp_cost:.0%}"] if tp_cost else []
    reasons += [f"EP communication +{ep_cost:.0%}"] if ep_cost else []
    return Candidate(run.layout, run.recompute, memory, cost, tuple(reasons))


def waiting_share(run: PlannedRun) -> float:
    """Time that pipeline ranks wait for each other, as a share of a step without: the bubble of 1F1B,
    (PP - 1) / micro-batches, and the excess of the last pipeline rank, which has the output matrix as well."""
    PP = run.layout.pipeline_model_parallel_size
    flops = training_flops_per_token(run.shape, run.sizes.trains, run.sizes.seq_length)
    # Forward, for the input's gradient, and for the weight's.
    output = sum(
        (3 if parameter.kind in run.sizes.trains else 2) * parameter.size
        for parameter in run.shape.parameters
        if parameter.layer is None and parameter.is_product
    )
    return (PP - 1) / run.num_microbatches + 2 * output / flops * (PP - 1)


def launching_share(run: PlannedRun, machine: Machine) -> float:
    """Time that the host launches, as a share of that in which the GPU computes a step without recomputation."""
    flops = training_flops_per_token(run.shape, run.sizes.trains, run.sizes.seq_length)
    tokens = run.sizes.global_batch_size * run.sizes.seq_length / run.sizes.gpus
    return launching_seconds(run) / (flops * tokens / machine.flops)


def without_launch_bound(run: PlannedRun, machine: Machine) -> int | None:
    """A larger micro-batch size for a layout whose launches take longer than its computation: the smallest of those
    twice, four times ... as large with which they do not, and which fits into memory and divides the global batch.
    Where none does, the largest that fits. None: there is nothing to gain."""
    larger, best = run, None
    while launching_share(larger, machine) > 1 + recomputed_share(larger):
        sizes = dataclasses.replace(larger.sizes, micro_batch_size=2 * larger.sizes.micro_batch_size)
        larger = dataclasses.replace(larger, sizes=sizes)
        try:
            sizes.num_microbatches(run.layout)
        except UserError:
            break
        if largest_rank(larger).total > machine.usable_bytes:
            break
        best = sizes.micro_batch_size
    return best


def recomputed_share(run: PlannedRun) -> float:
    """Operations of recomputing, as a share of a step without."""
    shape, S = run.shape, run.sizes.seq_length
    architecture = shape.architecture
    query = architecture.num_attention_heads * architecture.head_dim
    counts = count_parameters(shape.parameters)
    dense_ffns = sum(parameter.size for parameter in shape.parameters if parameter.name in DENSE_FFN_PRODUCTS)
    one_expert_a_layer = shape.num_moe_layers * sum(map(math.prod, projection_shapes(architecture)))
    forward: dict[Recompute, float] = {
        "none": 0.0,
        # Without a matrix product.
        "layernorm": 0.0,
        "moe_act": 0.0,
        # Q K^T and its product with V: 2 * 2 * S * H d, half of it under the causal mask.
        "core_attn": 2.0 * architecture.num_layers * query * S,
        "mlp": 2.0 * dense_ffns,
        "moe": 2.0 * (shape.top_k * one_expert_a_layer + counts[ParameterKind.SHARED_EXPERT]),
        # With nothing trained each matrix is counted forward and for its input's gradient: half is the forward pass.
        "full": training_flops_per_token(shape, (), S) / 2,
    }
    return forward[run.recompute] / training_flops_per_token(shape, run.sizes.trains, S)


def _cheapest(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The cheapest recompute mode of each layout."""
    best: dict[ParallelLayout, Candidate] = {}
    for candidate in sorted(candidates, key=lambda candidate: candidate.cost):
        best.setdefault(candidate.layout, candidate)
    return list(best.values())


def _nothing_fits(candidates: Sequence[Candidate], machine: Machine) -> str:
    smallest = min(candidates, key=lambda candidate: candidate.memory.total)
    layout = smallest.layout
    context = f" CP {layout.context_parallel_size}" if layout.context_parallel_size > 1 else ""
    parts = dataclasses.asdict(smallest.memory)
    largest = max(parts, key=parts.__getitem__)
    return (
        f"{machine.gpus} x {machine.gpu_memory:g} GiB: no layout fits; TP {layout.tensor_model_parallel_size} PP "
        f"{layout.pipeline_model_parallel_size} EP {layout.expert_model_parallel_size}{context} with recompute "
        f"{smallest.recompute} needs {smallest.memory.total / GIB:.1f} GiB a GPU, most of it {largest} "
        f"({parts[largest] / GIB:.1f} GiB); take more GPUs, fewer experts or a smaller --micro-batch-size"
    )


def _spread(shape: ModelShape, layer: int) -> Iterator[int]:
    """Numbers of experts of a layer that EP must divide: of a mixture base, and new ones."""
    base, groups = shape.base_experts(layer), shape.expert_groups(layer)
    return filter(None, (base if base > 1 else 0, *groups))


def _divisors(number: int, largest: int) -> list[int]:
    return [size for size in range(1, min(number, largest) + 1) if number % size == 0]
