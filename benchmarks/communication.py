"""What two models send in a training step on 8, 64 and 512 H100, and what would bound the step: on paper, never run.

For every number of GPUs and each stage the layout that is fastest on paper of those that fit into 80 GiB, and the
fastest that differs from it in whether experts are spread over ranks (where the experts don't allow that, in what else
is split). Bytes are those of planning/communication.py, the routing that of two evaluations (tools/evaluate.py).
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.model.configuration.architecture import read_architecture
from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.communication import busiest_rank
from megatron_moe_lpr.planning.interconnect import Hardware, StepTimes, step_times
from megatron_moe_lpr.planning.report import layout_sides
from megatron_moe_lpr.planning.routing import Routing, read_routing
from megatron_moe_lpr.planning.search import Candidate, Choice, Machine, find_layouts
from megatron_moe_lpr.planning.sizes import RunSizes
from megatron_moe_lpr.planning.traffic import Traffic
from megatron_moe_lpr.training.configuration.stages import STAGES, StageName

QWEN = {
    "model_type": "qwen2",
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 24,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
MODELS = {"Qwen1.5-1.8B": (QWEN, 6), "Llama-3-8B": (LLAMA, 5)}
"""Configuration of the dense model, and experts a layer."""
GPUS = (8, 64, 512)
SEQUENCES, LENGTHS = 512, {"1": 1024, "2": 512}
"""The paper's batch, and its sequences by stage."""
MICRO_BATCHES = (1, 2, 4, 8)
COLUMNS = (
    *("GPUs", "stage", "TP PP EP DP", "micro-batch", "GB: DP", "TP", "TP, inside", "EP", "EP, inside", "PP"),
    *("step, s", "inside", "of the step", "of the step, inside"),
)
WORDS = ("of the step", "of the step, inside")


@dataclasses.dataclass(frozen=True)
class Flags:
    """What two models send in a training step, and the step on paper."""

    stage1: Path
    """Evaluation of a checkpoint of stage 1, JSON: its routing is that of stage 1."""
    stage2: Path
    """The same of stage 2."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A layout with the original expert outside and inside the EP group."""

    sizes: RunSizes
    candidate: Candidate
    traffic: tuple[Traffic, Traffic]
    times: tuple[StepTimes, StepTimes]

    @property
    def layout(self) -> ParallelLayout:
        return self.candidate.layout

    @property
    def splits(self) -> tuple[bool, bool, bool]:
        """Whether experts, matrices and layers are spread over ranks."""
        sides = (
            self.layout.expert_model_parallel_size,
            self.layout.tensor_model_parallel_size,
            self.layout.pipeline_model_parallel_size,
        )
        return tuple(size > 1 for size in sides)


def main() -> None:
    """Print a table for each model, in Markdown."""
    flags = parse_flags(Flags, description=__doc__)
    routings: dict[StageName, Routing] = {"1": read_routing(flags.stage1), "2": read_routing(flags.stage2)}
    for name, (fields, experts) in MODELS.items():
        shape = ModelShape(read_architecture(fields), (experts,) * fields["num_hidden_layers"])
        print(f"\n{name}, {experts} experts a layer:\n")
        cells = []
        for gpus, (stage, routing) in itertools.product(GPUS, routings.items()):
            rows = sorted(_rows(shape, gpus, stage, routing), key=lambda row: row.times[0].total)
            cells += [_cells(row, stage) for row in _two_of(rows)]
        print(_table(cells))


def _table(rows: list[list[str]]) -> str:
    """Without the columns in which there is nothing."""
    columns = [column for column in zip(COLUMNS, *rows, strict=True) if any(column[1:])]
    lines = ["|" + "|".join("---" if column[0] in WORDS else "---:" for column in columns) + "|"]
    names, *bodies = ("| " + " | ".join(cells) + " |" for cells in zip(*columns, strict=True))
    return "\n".join([names, *lines, *bodies])


def _rows(shape: ModelShape, gpus: int, stage: StageName, routing: Routing) -> Iterator[Row]:
    """Every layout that fits, with every size of micro-batches."""
    hardware = Hardware()
    choice = Choice(tensor=(1, 2, 4, 8), pipeline=(1, 2, 4), expert=(1, 2, 4) if shape.max_experts == 5 else (1,))
    for micro_batch in MICRO_BATCHES:
        sizes = RunSizes(STAGES[stage].trains, gpus, LENGTHS[stage], micro_batch, SEQUENCES)
        try:
            candidates = find_layouts(shape, sizes, Machine(gpus, hardware.gpus_per_node, 80.0), choice)
        except UserError:
            continue
        for candidate in candidates:
            case = (shape, candidate.layout, sizes, candidate.recompute, routing)
            traffic = tuple(busiest_rank(*case, inside) for inside in (False, True))
            yield Row(sizes, candidate, traffic, tuple(step_times(*case, hardware, inside) for inside in (False, True)))


def _two_of(rows: list[Row]) -> list[Row]:
    best = rows[0]
    others = [row for row in rows if row.splits[0] != best.splits[0]]
    others = others or [row for row in rows if row.splits != best.splits]
    return [best, *others[:1]]


def _cells(row: Row, stage: str) -> list[str]:
    (outside, inside), (here, there) = row.traffic, row.times
    sent = (
        outside.data + outside.expert_data,
        *(outside.tensor, inside.tensor),
        *(outside.expert, inside.expert),
        outside.pipeline,
    )
    spreads_experts = row.splits[0]
    return [
        str(row.sizes.gpus),
        stage,
        " ".join(layout_sides(row.candidate, row.sizes.gpus)),
        str(row.sizes.micro_batch_size),
        *(_gigabytes(size) for size in sent),
        f"{here.total:.3f}",
        f"{there.total:.3f}" if spreads_experts else "",
        here.bound,
        there.bound if spreads_experts else "",
    ]


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size >= 5e6 else ("0.00" if size else "")


if __name__ == "__main__":
    run_command(main)
