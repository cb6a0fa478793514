"""A plan, for people."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megatron_moe_lpr.model.config import ModelShape
from megatron_moe_lpr.model.flops import training_flops_per_token
from megatron_moe_lpr.planning.memory import GIB, RunSizes, worst_total
from megatron_moe_lpr.planning.parameters import active_parameters, model_parameters, trainable
from megatron_moe_lpr.planning.search import Candidate, Machine


def print_plan(shape: ModelShape, sizes: RunSizes, machine: Machine, candidates: Sequence[Candidate]) -> None:
    """Model, operations and layouts."""
    counts = model_parameters(shape)
    flops = training_flops_per_token(shape, sizes.trains, sizes.seq_length)
    console = Console(width=160)
    console.print(
        f"Parameters: {sum(counts.values()):,} in all, {active_parameters(shape):,} active in a token, "
        f"{trainable(counts, sizes.trains):,} trained\n"
        f"Operations: {flops / 1e9:,.2f} GFLOP a token to train at {sizes.seq_length:,} tokens a sequence "
        "(no weight gradients where frozen)"
    )
    console.print(_layouts(shape, sizes, machine, candidates))
    if shape.num_moe_layers:
        console.print(
            "Routing is taken as balanced, every expert with as many tokens as every other; worst: total where all "
            "tokens of an EP group choose the experts of one rank."
        )


def _layouts(shape: ModelShape, sizes: RunSizes, machine: Machine, candidates: Sequence[Candidate]) -> Table:
    precision = f"fp8 {sizes.fp8_recipe}" if sizes.precision == "fp8" else sizes.precision
    title = (
        f"Layouts for {machine.gpus} x {machine.gpu_memory:g} GiB, best first; GiB of the fullest rank "
        f"(micro-batch {sizes.micro_batch_size}, {precision})"
    )
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "reserved", "total")
    table = Table(title=title, title_justify="left")
    for name in ("TP", "PP", "EP", "DP", "recompute", *parts, "worst"):
        table.add_column(name, justify="left" if name == "recompute" else "right")
    table.add_column("why", overflow="fold")
    for candidate in candidates:
        layout = candidate.layout
        sides = (
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            layout.expert_model_parallel_size,
            layout.data_parallel_size(machine.gpus),
        )
        memory = (f"{getattr(candidate.memory, part) / GIB:.1f}" for part in parts)
        worst = f"{worst_total(shape, layout, sizes, candidate.recompute) / GIB:.1f}"
        table.add_row(*map(str, sides), candidate.recompute, *memory, worst, ", ".join(candidate.reasons))
    return table
