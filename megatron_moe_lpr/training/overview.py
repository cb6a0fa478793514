"""The tables that a run prints before its first step: parameters and data."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich.console import Console
from rich.table import Table

from megatron_moe_lpr.checkpoint.format.chain import open_reader
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind, kind_of
from megatron_moe_lpr.training.setup import Run


def print_overview(run: Run) -> None:
    """Print on rank 0 which parameters train and which are frozen, and the training data. Every rank may call it."""
    if dist.get_rank() != 0:
        return
    for note in run.sources.notes:
        print(f"note: {note}", flush=True)
    console = Console()
    console.print(_parameter_table(run))
    console.print(_data_table(run))


def _parameter_table(run: Run) -> Table:
    counts = dict.fromkeys(ParameterKind, 0)
    for key, info in open_reader(run.model.directory).tensors.items():
        if key.startswith(("embedding.", "decoder.", "output_layer.")):
            kind = kind_of(key, run.model.shape.inserted_blocks, len(run.model.shape.new_tokens))
            counts[kind] += torch.Size(info.shape).numel()
    layout = run.config.layout
    title = (
        f"Stage {run.stage.name}: {run.stage.title} on {run.platform.name}, TP {layout.tensor_model_parallel_size} "
        f"PP {layout.pipeline_model_parallel_size} EP {layout.expert_model_parallel_size} "
        f"{f'CP {layout.context_parallel_size} ' if layout.context_parallel_size > 1 else ''}"
        f"DP {parallel_state.get_data_parallel_world_size()}"
    )
    table = Table("parameters", "count", "", title=title, title_justify="left")
    for kind, count in counts.items():
        if count:
            trains = kind in run.stage.trains
            table.add_row(kind, f"{count:,}", "[green]trains[/green]" if trains else "frozen")
    trainable = sum(count for kind, count in counts.items() if kind in run.stage.trains)
    table.add_row("all", f"{sum(counts.values()):,}", f"{trainable:,} train", style="bold")
    return table


def _data_table(run: Run) -> Table:
    batch = run.config.batch
    tokens = batch.train_iters * batch.global_batch_size * batch.seq_length
    table = Table("language", "", "share", "tokens to draw", "epochs", title="Training data", title_justify="left")
    for share in run.sources.tokens_by_language(tokens):
        kind = "original" if share.is_original else "expanded"
        numbers = (f"{share.fraction:.2%}", f"{share.tokens_drawn:,.0f}", f"{share.epochs:.2f}")
        table.add_row(share.language, kind, *numbers)
    return table
