"""The tables that `moe-lpr plan` prints."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.flops import training_flops_per_token
from megatron_moe_lpr.model.parameter_counts import active_parameters, count_parameters
from megatron_moe_lpr.planning.communication import busiest_rank
from megatron_moe_lpr.planning.interconnect import Hardware, step_times
from megatron_moe_lpr.planning.launches import LAUNCH_SECONDS, launches_per_micro_batch, launching_seconds
from megatron_moe_lpr.planning.memory import GIB, worst_total
from megatron_moe_lpr.planning.parameters import trainable
from megatron_moe_lpr.planning.planned_run import PlannedRun
from megatron_moe_lpr.planning.routing import Routing
from megatron_moe_lpr.planning.search import Candidate, Machine, launching_share, recomputed_share, without_launch_bound
from megatron_moe_lpr.planning.sizes import RunSizes


def print_plan(shape: ModelShape, sizes: RunSizes, machine: Machine, candidates: Sequence[Candidate]) -> None:
    """Print the model's parameters and operations, and a table of layouts."""
    counts, mixture = count_parameters(shape.parameters), shape.architecture.mixture
    base = mixture.num_experts if mixture else 1
    flops = training_flops_per_token(shape, sizes.trains, sizes.seq_length)
    console = Console(width=160)
    console.print(
        f"Parameters: {sum(counts.values()):,} in all, {active_parameters(counts, shape.top_k, base):,} active in a "
        f"token, {trainable(counts, sizes.trains):,} trained\n"
        f"Operations: {flops / 1e9:,.2f} GFLOP a token to train at {sizes.seq_length:,} tokens a sequence "
        "(no weight gradients where frozen)"
    )
    console.print(_layouts(shape, sizes, machine, candidates))
    if sizes.transformer_engine:
        console.print(
            "Planned for the layers of Transformer Engine; --transformer-impl local plans those of GPUs without it."
        )
    else:
        console.print("Planned for layers of PyTorch alone (--transformer-impl local).")
    if shape.num_moe_layers:
        console.print(
            "Routing is taken as balanced, every expert with as many tokens as every other; worst: total where all "
            "tokens of an EP group choose the experts of one rank."
        )


def print_communication(
    shape: ModelShape, sizes: RunSizes, candidates: Sequence[Candidate], routing: Routing, hardware: Hardware
) -> None:
    """Print what a rank of each layout sends in a step, and the estimated time of the step."""
    title = (
        f"GB that the busiest rank sends in a step of {sizes.global_batch_size:,} x {sizes.seq_length:,} tokens, and "
        "estimated step time (never measured)"
    )
    table = Table(title=title, title_justify="left")
    splits = context_parallel(candidates)
    sent = ("sent: DP", "TP", *["CP"] * splits, "EP", "PP")
    for name in ("TP", "PP", "EP", "DP", *["CP"] * splits, *sent, "step, s", "compute, s"):
        table.add_column(name, justify="right")
    table.add_column("where the time goes", overflow="fold")
    table.add_column("with the original expert inside the EP group", overflow="fold")
    for candidate in candidates:
        table.add_row(*_communication_row(shape, sizes, candidate, routing, hardware))
    console = Console(width=160)
    console.print(table)
    console.print(
        f"Assumed: {hardware.peak_tflops:g} TFLOP/s at {hardware.utilization:.0%}, {hardware.node_bandwidth:g} GB/s "
        f"inside a node of {hardware.gpus_per_node} GPUs, {hardware.network_bandwidth:g} GB/s a GPU between nodes; DP "
        "overlaps with the computation of one micro-batch, TP, EP and PP with nothing. "
        + (_routing_words(routing) if shape.num_moe_layers else "")
    )


def print_launches(run: PlannedRun, machine: Machine) -> None:
    """Print how many launches a layout needs and, where they take longer than its computation, what helps."""
    if not run.sizes.transformer_engine:
        print(
            "Launches of PyTorch's own layers are not counted: layouts are ordered with those of Transformer Engine's."
        )
        return
    most = max(launches_per_micro_batch(run, pipeline_rank) for pipeline_rank in run.pipeline_ranks)
    host = launching_seconds(run) / run.num_microbatches
    device = host / launching_share(run, machine) * (1 + recomputed_share(run))
    words = (
        f"The first layout launches {most:,} kernels a micro-batch, {1e3 * host:,.1f} ms of the host at "
        f"{1e6 * LAUNCH_SECONDS:g} us each (assumed), and computes for {1e3 * device:,.1f} ms."
    )
    if host > device:
        larger = without_launch_bound(run, machine)
        hint = f"pass --micro-batch-size {larger}" if larger else "no larger --micro-batch-size fits"
        words += f" The host sets the pace: {hint}."
    print(words)


def _communication_row(
    shape: ModelShape, sizes: RunSizes, candidate: Candidate, routing: Routing, hardware: Hardware
) -> list[str]:
    run = PlannedRun(shape, candidate.layout, sizes, candidate.recompute)
    sent, sent_in_group = (busiest_rank(run, routing, in_group) for in_group in (False, True))
    time, time_in_group = (step_times(run, routing, hardware, in_group) for in_group in (False, True))
    context = [sent.context] * context_parallel([candidate])
    numbers = (sent.data + sent.expert_data, sent.tensor, *context, sent.expert + sent.expert_tensor, sent.pipeline)
    in_ep_group = ""
    if run.layout.expert_model_parallel_size > 1:
        exchanged = sent_in_group.expert + sent_in_group.expert_tensor
        in_ep_group = f"EP {exchanged / 1e9:,.2f} GB, step {time_in_group.total:,.3f} s: {time_in_group.bound}"
    return [
        *parallel_sizes(candidate, sizes.gpus),
        *(f"{number / 1e9:,.2f}" for number in numbers),
        f"{time.total:,.3f}",
        f"{time.compute:,.3f}",
        time.bound,
        in_ep_group,
    ]


def context_parallel(candidates: Sequence[Candidate]) -> bool:
    """Whether the plan has CP, which then is the same in all layouts."""
    return candidates[0].layout.context_parallel_size > 1


def parallel_sizes(candidate: Candidate, gpus: int) -> list[str]:
    """TP, PP, EP and DP of a layout, and CP where the plan has it."""
    layout = candidate.layout
    sizes = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.expert_model_parallel_size,
        layout.data_parallel_size(gpus),
        *[layout.context_parallel_size] * context_parallel([candidate]),
    )
    return [str(size) for size in sizes]


def _routing_words(routing: Routing) -> str:
    if not routing.layers:
        return "Routing is taken as balanced (--routing: as an evaluation found it)."
    share = sum(shares[0] for shares in routing.layers) / len(routing.layers)
    return (
        f"Routing: {share:.1%} of the tokens have the original expert among their top k "
        f"({routing.original_share:.0%} of the tokens are of original languages)."
    )


def _layouts(shape: ModelShape, sizes: RunSizes, machine: Machine, candidates: Sequence[Candidate]) -> Table:
    precision = f"fp8 {sizes.fp8_recipe}" if sizes.precision == "fp8" else sizes.precision
    title = (
        f"Layouts for {machine.gpus} x {machine.gpu_memory:g} GiB, best first; GiB of the fullest rank "
        f"(micro-batch {sizes.micro_batch_size}, {precision})"
    )
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "reserved", "total")
    table = Table(title=title, title_justify="left")
    for name in ("TP", "PP", "EP", "DP", *["CP"] * context_parallel(candidates), "recompute", *parts, "worst"):
        table.add_column(name, justify="left" if name == "recompute" else "right")
    table.add_column("why", overflow="fold")
    for candidate in candidates:
        memory = (f"{getattr(candidate.memory, part) / GIB:.1f}" for part in parts)
        run = PlannedRun(shape, candidate.layout, sizes, candidate.recompute)
        worst = f"{worst_total(run) / GIB:.1f}"
        table.add_row(
            *parallel_sizes(candidate, machine.gpus), candidate.recompute, *memory, worst, ", ".join(candidate.reasons)
        )
    return table
