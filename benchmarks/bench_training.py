"""Speed and memory of training on this machine's CPU, beside transformers' own MoE and the machine's limit.

One model of random weights, upcycled, is trained in stages 1, 2 and full, in fp32 and bf16:
- ours: as `megatron_moe_lpr.pretrain` steps it, in one process with two threads and in two data-parallel ranks of one;
- peer: the same weights in transformers' stock Qwen2-MoE with the same parameters trainable, an ordinary PyTorch loop
  with SDPA attention, bf16 by autocast; its implementation of experts is the one that is faster in a short trial;
- floor: the matrix products of a step and nothing else (benchmarks/training/floor.py).

All candidates of a stage alternate, so that other load on the machine falls on all of them alike; medians count.
"""

import dataclasses
import itertools
import json
import platform
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError, run_command

PRECISIONS = ("fp32", "bf16")
EXPERTS = ("eager", "grouped_mm")
"""Implementations of experts in transformers; the third one copies the weights of every token's experts."""
WARM_UP = 2


@dataclasses.dataclass
class Flags:
    """Speed and memory of training on this machine's CPU."""

    stages: tuple[Literal["1", "2", "full"], ...] = ("1", "2", "full")
    precisions: tuple[Literal["fp32", "bf16"], ...] = PRECISIONS
    rounds: int = 6
    """Rounds, in each of which every candidate is measured once."""
    steps: int = 2
    """Steps of a candidate in a round."""
    quick: bool = False
    """Two rounds of one step, without the two ranks: checks that the benchmark runs, and measures nothing."""
    directory: Path | None = None
    """Directory of model and data. Default: the temporary directory."""
    json: Path | None = None
    """Write the figures to this file too."""


def main() -> None:
    """Measure, print the tables and write the figures."""
    flags = parse_flags(Flags, description=__doc__)
    if flags.rounds < 1 or flags.steps < 1:
        raise UserError("--rounds and --steps: at least 1")
    if flags.quick:
        flags = dataclasses.replace(flags, rounds=2, steps=1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=flags.directory, prefix="bench-training-") as work:
        inputs, sizes = prepare(Path(work))
        for stage in flags.stages:
            rows += measure(flags, stage, inputs, sizes, Path(work))
            print_table(rows, stage)
            print_kinds(rows, stage)
    if flags.json:
        text = json.dumps({"machine": platform.processor() or platform.machine(), "sizes": sizes, "rows": rows})
        flags.json.write_text(text + "\n", encoding="utf-8")


def prepare(work: Path) -> tuple[dict[str, str], dict[str, int]]:
    """Write the model in both formats and its data; return their paths and the sizes."""
    from benchmarks.training.inputs import Sizes, make_inputs

    inputs = dataclasses.asdict(make_inputs(work, Sizes()))
    return {name: str(path) for name, path in inputs.items()}, dataclasses.asdict(Sizes())


def measure(flags: Flags, stage: str, inputs: dict, sizes: dict, work: Path) -> list[dict[str, Any]]:
    """Measure all candidates of a stage alternately; return a row of figures for each."""
    from benchmarks.training.processes import Candidate

    def candidate(name: str, precision: str, kind: str, ranks: int = 1, **more: str) -> Candidate:
        task = {"candidate": kind, "stage": stage, "precision": precision, "inputs": inputs, "sizes": sizes, **more}
        return stack.enter_context(Candidate(name, task, work, ranks))

    with ExitStack() as stack:
        running, peers = [], []
        for precision in flags.precisions:
            running.append(candidate("floor", precision, "floor"))
            running.append(candidate("ours", precision, "ours"))
            if not flags.quick:
                running.append(candidate("ours, 2 ranks", precision, "ours", ranks=2))
            peers.append([candidate(f"peer, {name}", precision, "stock", experts=name) for name in EXPERTS])
        for each in (*running, *itertools.chain(*peers)):
            each.steps(WARM_UP)
        running += [faster(forms) for forms in peers]
        for _ in range(flags.rounds):
            for each in running:
                each.measure(flags.steps)
        return [figures(stage, each, running, sizes) | {"time_by_kind": each.profile()} for each in running]


def faster(peers: list) -> Any:
    """Return the candidate with the shortest step and end the others."""
    times = [[step.seconds for step in peer.steps(1)] for _ in range(2) for peer in peers]
    best = min(range(len(peers)), key=lambda index: min(times[index], times[index + len(peers)]))
    for index, peer in enumerate(peers):
        if index != best:
            peer.__exit__(None, None, None)
    return peers[best]


def figures(stage: str, candidate: Any, running: list, sizes: dict[str, int]) -> dict[str, Any]:
    """Return the row of a candidate, with its speed relative to other candidates of the same stage."""

    def ratio(name: str, precision: str) -> float | None:
        """Return the speed relative to the candidate of that name, as the median over the rounds."""
        others = [other for other in running if other.name.startswith(name) and other.precision == precision]
        if not others or others[0] is candidate:
            return None
        pairs = zip(others[0].measured, candidate.measured, strict=True)
        return statistics.median(theirs.seconds / own.seconds for theirs, own in pairs)

    return {
        "stage": stage,
        "precision": candidate.precision,
        "candidate": candidate.name,
        "tokens_per_second": sizes["seq_length"] * sizes["batch_size"] / candidate.seconds,
        "cpu_seconds_per_step": candidate.cpu_seconds,
        "peak_megabytes": candidate.peak_megabytes,
        "share_of_floor": ratio("floor", candidate.precision),
        "times_peer": ratio("peer", candidate.precision),
        "times_ours_fp32": ratio("ours", "fp32") if candidate.name.startswith("ours") else None,
    }


def print_table(rows: list[dict[str, Any]], stage: str) -> None:
    """Print the rows of one stage."""
    table = Table(title=f"stage {stage}")
    columns = ("", "tokens/s", "CPU s / step", "peak MB", "share of floor", "x peer", "x ours fp32")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        if row["stage"] == stage:
            table.add_row(
                f"{row['candidate']}, {row['precision']}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['cpu_seconds_per_step']:.2f}",
                f"{row['peak_megabytes']:,.0f}",
                *(format_ratio(row[name]) for name in ("share_of_floor", "times_peer", "times_ours_fp32")),
            )
    Console(width=110).print(table)


def print_kinds(rows: list[dict[str, Any]], stage: str) -> None:
    """Print the shares of a profiled step's time by kind of operation."""
    table = Table(title=f"stage {stage}: share of a step's time")
    table.add_column("")
    chosen = [row for row in rows if row["stage"] == stage and not row["candidate"].startswith("floor")]
    for kind in chosen[0]["time_by_kind"]:
        table.add_column(kind, justify="right")
    for row in chosen:
        parts = (f"{part:.0%}" for part in row["time_by_kind"].values())
        table.add_row(f"{row['candidate']}, {row['precision']}", *parts)
    Console(width=110).print(table)


def format_ratio(value: float | None) -> str:
    """Return a ratio with two decimals; empty for None."""
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    run_command(main)
