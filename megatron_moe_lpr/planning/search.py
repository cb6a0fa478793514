"""Which layouts a run can use on given GPUs, best first."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.config import ModelShape, check_layout
from megatron_moe_lpr.model.configuration.recompute import NOT_DELAYED
from megatron_moe_lpr.model.flops import training_flops_per_token
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.activations import Recompute
from megatron_moe_lpr.planning.memory import GIB, RankMemory, RunSizes, largest_rank

# Rules of thumb for the order, not measurements: what one doubling of a dimension costs inside a node and across nodes.
COST_OF_TP, COST_OF_EP, ACROSS_NODES = 0.08, 0.05, 4.0
USABLE = 0.95
"""Share of a GPU's memory that may be planned with; the rest goes to fragmentation."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The GPUs of a run."""

    gpus: int
    gpus_per_node: int
    gpu_memory: float
    """GiB of one GPU."""

    @property
    def usable_bytes(self) -> float:
        """Memory of one GPU to plan with."""
        return self.gpu_memory * GIB * USABLE


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layout that the model and the batch split into."""

    layout: ParallelLayout
    recompute: Recompute
    memory: RankMemory
    cost: float
    """Expected time of a step, relative; 1 is one with nothing recomputed, communicated or waited for."""
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Values to try for each dimension; empty: all that make sense."""

    tensor: Sequence[int] = ()
    pipeline: Sequence[int] = ()
    expert: Sequence[int] = ()
    recompute: Sequence[Recompute] = ()

    def layouts(self, shape: ModelShape, machine: Machine) -> Iterator[ParallelLayout]:
        """Every combination, whether it splits or not."""
        new_experts = shape.max_experts - 1
        tensor = self.tensor or [size for size in (1, 2, 4, 8, 16) if size <= machine.gpus_per_node]
        pipeline = self.pipeline or _divisors(shape.architecture.num_layers, machine.gpus)
        expert = self.expert or (_divisors(new_experts, machine.gpus) if new_experts else [1])
        for tp, pp, ep in itertools.product(tensor, pipeline, expert):
            yield ParallelLayout(tp, pp, expert_model_parallel_size=ep)


def find_layouts(shape: ModelShape, sizes: RunSizes, machine: Machine, choice: Choice) -> list[Candidate]:
    """Layouts that the model and the batch split into and that fit into memory, best first.

    Raises:
        UserError: none splits (the reason of the first tried) or none fits (what the smallest needs).
    """
    candidates: list[Candidate] = []
    refused: list[UserError] = []
    kinds = choice.recompute or _worth_trying(shape, sizes)
    for kind in kinds:
        check_recompute(sizes, kind)
    for layout in choice.layouts(shape, machine):
        try:
            check(shape, layout, sizes)
        except UserError as error:
            refused.append(error)
            continue
        candidates += [evaluate(shape, layout, sizes, machine, kind) for kind in kinds]
    if not candidates:
        raise refused[0]
    fitting = [candidate for candidate in candidates if candidate.memory.total <= machine.usable_bytes]
    if not fitting:
        raise UserError(_nothing_fits(candidates, machine))
    return sorted(_first_that_fit(fitting), key=lambda candidate: (candidate.cost, candidate.memory.total))


def check(shape: ModelShape, layout: ParallelLayout, sizes: RunSizes) -> None:
    """Check that ranks, model, sequence and batch split into a layout.

    Raises:
        UserError: naming what does not.
    """
    layout.check_world(sizes.gpus)
    check_layout(shape, layout)
    layout.check_sequence(sizes.seq_length)
    together = sizes.micro_batch_size * layout.data_parallel_size(sizes.gpus)
    if sizes.global_batch_size % together:
        raise UserError(
            f"--global-batch-size {sizes.global_batch_size} is not a multiple of --micro-batch-size "
            f"{sizes.micro_batch_size} x {together // sizes.micro_batch_size} data-parallel ranks = {together}"
        )


def check_recompute(sizes: RunSizes, recompute: Recompute) -> None:
    """Check that Megatron has the mode for the numbers computed with.

    Raises:
        UserError: it has not.
    """
    if sizes.precision == "fp8" and sizes.fp8_recipe == "delayed" and recompute in NOT_DELAYED:
        raise UserError(
            f"--recompute {recompute} does not go with --fp8-recipe delayed; choose tensorwise or blockwise"
        )


def _worth_trying(shape: ModelShape, sizes: RunSizes) -> Sequence[Recompute]:
    """Without `core_attn`, which saves nothing with fused attention, and `layernorm`, which saves little."""
    if shape.num_moe_layers == 0:
        return ("none", "mlp", "full")
    delayed = sizes.precision == "fp8" and sizes.fp8_recipe == "delayed"
    return ("none", "moe", "full") if delayed else ("none", "moe_act", "moe", "full")


def evaluate(
    shape: ModelShape, layout: ParallelLayout, sizes: RunSizes, machine: Machine, recompute: Recompute
) -> Candidate:
    """Memory and expected cost of one layout."""
    memory = largest_rank(shape, layout, sizes, recompute)
    tp, ep = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
    waiting = waiting_share(shape, layout, sizes)
    again = recomputed_share(shape, sizes, recompute)
    tp_cost = COST_OF_TP * math.log2(tp)
    ep_cost = COST_OF_EP * math.log2(ep) * (ACROSS_NODES if max(tp, ep) > machine.gpus_per_node else 1)
    cost = (1 + again) * (1 + waiting) * (1 + tp_cost + ep_cost)
    reasons = [f"{(machine.usable_bytes - memory.total) / GIB:.0f} GiB free"]
    reasons += ["nothing recomputed"] if recompute == "none" else [f"recompute {recompute} +{again:.0%}"]
    reasons += [f"pipeline bubble +{waiting:.0%}"] if waiting else []
    reasons += [f"TP communication +{tp_cost:.0%}"] if tp_cost else []
    reasons += [f"EP communication +{ep_cost:.0%}"] if ep_cost else []
    return Candidate(layout, recompute, memory, cost, tuple(reasons))


def waiting_share(shape: ModelShape, layout: ParallelLayout, sizes: RunSizes) -> float:
    """Time that pipeline stages wait for each other, against a step without."""
    stages = layout.pipeline_model_parallel_size
    return (stages - 1) / sizes.num_microbatches(layout) + _excess_of_last_stage(shape, sizes, stages)


def _excess_of_last_stage(shape: ModelShape, sizes: RunSizes, stages: int) -> float:
    """How much longer than the average pipeline stage the last one takes, which has the output matrix as well."""
    flops = training_flops_per_token(shape, sizes.trains, sizes.seq_length)
    passes = 3 if "embedding" in sizes.trains else 2
    head = 2 * passes * shape.architecture.hidden_size * shape.architecture.vocab_size
    return head / flops * (stages - 1)


def recomputed_share(shape: ModelShape, sizes: RunSizes, recompute: Recompute) -> float:
    """Extra operations of recomputing, against a step without."""
    architecture = shape.architecture
    ffn = 6.0 * architecture.hidden_size * architecture.ffn_hidden_size
    dense_layers = architecture.num_layers - shape.num_moe_layers
    query = architecture.num_attention_heads * architecture.head_dim
    forward = {
        "none": 0.0,
        "layernorm": 0.0,
        # Without a matrix product.
        "moe_act": 0.0,
        "core_attn": 2.0 * architecture.num_layers * query * sizes.seq_length,
        "mlp": dense_layers * ffn,
        "moe": shape.num_moe_layers * shape.top_k * ffn,
        # With nothing trained each matrix is counted forward and for its input's gradient: half is the forward pass.
        "full": training_flops_per_token(shape, (), sizes.seq_length) / 2,
    }
    return forward[recompute] / training_flops_per_token(shape, sizes.trains, sizes.seq_length)


def _first_that_fit(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Of each layout the cheapest recompute choice."""
    best: dict[ParallelLayout, Candidate] = {}
    for candidate in sorted(candidates, key=lambda candidate: candidate.cost):
        best.setdefault(candidate.layout, candidate)
    return list(best.values())


def _nothing_fits(candidates: Sequence[Candidate], machine: Machine) -> str:
    smallest = min(candidates, key=lambda candidate: candidate.memory.total)
    layout = smallest.layout
    parts = dataclasses.asdict(smallest.memory)
    largest = max(parts, key=parts.__getitem__)
    return (
        f"{machine.gpus} x {machine.gpu_memory:g} GiB: no layout fits; TP {layout.tensor_model_parallel_size} PP "
        f"{layout.pipeline_model_parallel_size} EP {layout.expert_model_parallel_size} with recompute "
        f"{smallest.recompute} needs {smallest.memory.total / GIB:.1f} GiB a GPU, most of it {largest} "
        f"({parts[largest] / GIB:.1f} GiB); take more GPUs, fewer experts or a smaller --micro-batch-size"
    )


def _divisors(number: int, largest: int) -> list[int]:
    return [size for size in range(1, min(number, largest) + 1) if number % size == 0]
