"""What `moe-lpr rehearse` prints and writes."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_moe_lpr.planning.memory import GIB
from megatron_moe_lpr.rehearsal.comparison import Part, remarks
from megatron_moe_lpr.rehearsal.rank import Rehearsed
from megatron_moe_lpr.rehearsal.record import Collective

WIDTH = 160
DIMENSIONS = ("pp", "tp", "ep", "dp")


def print_results(results: Sequence[tuple[Rehearsed, list[Part]]]) -> None:
    """Print the memory of all ranks, what differs from the plan, and collectives of a rank of each pipeline rank."""
    print_memory(results)
    for rehearsed, parts in results:
        for line in remarks(rehearsed, parts):
            print(line)
    shown: dict[int, Rehearsed] = {}
    for rehearsed, _ in results:
        shown.setdefault(rehearsed.coordinates["pp"], rehearsed)
    for rehearsed in shown.values():
        print_collectives(rehearsed)


def print_memory(results: Sequence[tuple[Rehearsed, list[Part]]]) -> None:
    """Print each rank's memory beside the plan's."""
    title = "GiB of a rank (simulated), planned behind it, and the difference where it is 0.5% or more"
    table = Table("rank", *DIMENSIONS, title=title, title_justify="left")
    for part in results[0][1]:
        table.add_column(part.name, justify="right")
    for rehearsed, parts in results:
        place = [str(rehearsed.coordinates[name]) for name in DIMENSIONS]
        table.add_row(str(rehearsed.record.rank), *place, *map(_cell, parts))
    Console(width=WIDTH).print(table)


def _cell(part: Part) -> str:
    if part.planned is None:
        return _number(part.rehearsed / GIB)
    text = f"{_number(part.rehearsed / GIB)} / {_number(part.planned / GIB)}"
    return f"{text} {part.difference:+.1%}" if part.difference and abs(part.difference) >= 0.005 else text


def _number(value: float) -> str:
    return f"{value:,.2f}" if value >= 0.1 or not value else f"{value:.2g}"


def print_collectives(rehearsed: Rehearsed) -> None:
    """Print how often a rank called each collective, by phase and group, and the bytes that it handed in."""
    title = f"Collectives of rank {rehearsed.record.rank} (simulated: recorded, not run)"
    table = Table("phase", "group", "ranks", "collective", title=title, title_justify="left")
    table.add_column("calls", justify="right")
    table.add_column("GB", justify="right")
    for (phase, group, ranks, kind), (calls, size) in summary(rehearsed.record.collectives).items():
        table.add_row(phase, group, str(ranks), kind, f"{calls:,}", _number(size / 1e9))
    Console(width=WIDTH).print(table)


def summary(collectives: Sequence[Collective]) -> dict[tuple[str, str, int, str], tuple[int, int]]:
    """Calls and bytes by phase, group, its number of ranks, and kind, in the order of the first calls."""
    calls: Counter[tuple[str, str, int, str]] = Counter()
    sizes: Counter[tuple[str, str, int, str]] = Counter()
    for one in collectives:
        key = one.phase, one.group, len(one.ranks), one.kind
        calls[key] += 1
        sizes[key] += one.bytes
    return {key: (count, sizes[key]) for key, count in calls.items()}


def as_json(results: Sequence[tuple[Rehearsed, list[Part]]], world_size: int, notes: Sequence[str]) -> dict[str, Any]:
    """Everything recorded, in JSON's types."""
    return {
        "simulated": list(notes),
        "world_size": world_size,
        "ranks": [
            {
                "coordinates": rehearsed.coordinates,
                "planned": {part.name: part.planned for part in parts},
                "loss": None if math.isnan(rehearsed.loss) else rehearsed.loss,
                **dataclasses.asdict(rehearsed.record),
            }
            for rehearsed, parts in results
        ],
    }
