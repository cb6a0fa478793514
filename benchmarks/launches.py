"""Launches, bytes and memory of one MoE layer, ours and Megatron's own of the same sizes and flags, on no GPU.

    .venv-te/bin/python -m benchmarks.launches [--json FILE] [--places]    # the environment of `make test-te`

The emulated device counts what a GPU would be given to do in a forward and a backward pass (tests/gpu/launches.py). The
host's time is that of this machine's CPU around emulated kernels: only the ratio of two of them says something.
"""

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.files.json_files import write_json
from tests.emulation import extension

EP2 = (("expert_model_parallel_size", 2),)
TP2 = (("tensor_model_parallel_size", 2),)
CASES = {
    "one rank": {},
    "EP 2": {"layout": EP2},
    "TP 2": {"layout": TP2},
    "recompute moe": {"recompute": "moe"},
    "FP8 tensorwise": {"number": "tensorwise"},
    "a step that logs": {"logs": True},
}
ROWS = {
    "dispatched operations": "dispatched",
    "launches": "launches",
    "of these neither products nor main gradients": "others",
    "collectives": "collectives",
    "bytes of those, a token / hidden": "bytes",
    "kept for backward, x 2 hidden bytes a token": "kept",
    "CPU time of the host, ms": "host",
}


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of this benchmark."""

    json: Path | None = None
    """Also write all counts to this file."""
    places: bool = False
    """Also print where each launch comes from."""


def main() -> None:
    """Count and print."""
    flags = parse_flags(Flags, description=__doc__)
    if not extension.is_available():
        raise UserError("this needs the environment of `make test-te`: .venv-te/bin/python -m benchmarks.launches")
    extension.install()
    from tests.gpu import ranks

    found = {}
    for case, fields in CASES.items():
        found[case] = {stage: _pair(fields | {"stage": stage}) for stage in ("1", "2")}
        Console(width=140).print(_table(case, found[case]))
        if flags.places:
            _print_places(case, found[case])
    if flags.json:
        write_json(found, flags.json)
    ranks.close()


def _pair(fields: dict) -> dict[str, dict]:
    """Counts of our layer and of Megatron's, of the rank with the most launches."""
    from tests.gpu import ranks
    from tests.gpu.one_layer import Layer, count

    counts = {}
    for owner in ("ours", "Megatron's"):
        layer = Layer(owner=owner, **fields)
        found = ranks.run(layer.ranks, count, layer)
        counts[owner] = dataclasses.asdict(max(found, key=lambda rank: rank.launches))
    return counts


def _table(case: str, stages: dict[str, dict[str, dict]]) -> Table:
    columns = [(stage, owner) for stage in stages for owner in stages[stage]]
    table = Table(
        f"one MoE layer, forward + backward: {case}", *(f"{owner}, stage {stage}" for stage, owner in columns)
    )
    for title, field in ROWS.items():
        values = (stages[stage][owner][field] for stage, owner in columns)
        table.add_row(title, *(f"{value:.2f}" if isinstance(value, float) else f"{value}" for value in values))
    return table


def _print_places(case: str, stages: dict[str, dict[str, dict]]) -> None:
    for stage, owners in stages.items():
        for owner, counts in owners.items():
            print(f"{case}, stage {stage}, {owner}")
            for number, place, name in counts["places"]:
                print(f"  {number:4} {name:34} {place}")


if __name__ == "__main__":
    run_command(main)
