"""What grows with the number of ranks: start, heartbeat, checkpoints. Simulated on this machine, never run on so many.

    python -m benchmarks.world_growth                   # 8, 64, 512 and 4,096 ranks: a few minutes
    python -m benchmarks.world_growth --ranks 8 64

One process does what rank 0 of such a world would do, with messages of the size that the other ranks would send: of
Llama-3-8B with four new experts a layer, in stage 1, with TP 2 and EP 4. Counts and bytes are exact for that layout;
seconds are those of this machine's processor, without network or disk of a cluster.
"""

import dataclasses
import gc
import tempfile
from pathlib import Path

from benchmarks.growth.others import measure_others
from benchmarks.growth.saves import measure_saves
from benchmarks.growth.shards import World
from benchmarks.growth.start import measure_start
from benchmarks.growth.store import measure_store
from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.platform import select_platform

LEAST = 8


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of this benchmark."""

    ranks: tuple[int, ...] = (8, 64, 512, 4096)
    """Sizes of the simulated worlds, multiples of 8."""


def main() -> None:
    """Measure every world and print one table, in Markdown."""
    flags = parse_flags(Flags, description=__doc__)
    for size in flags.ranks:
        if size % LEAST or size < LEAST:
            raise UserError(f"--ranks {size}: a multiple of {LEAST} is expected, for TP 2 and EP 4")
    select_platform("cpu")
    columns = [measure(size) for size in flags.ranks]
    print("| ranks |" + "".join(f" {size:,} |" for size in flags.ranks))
    print("|---|" + "---:|" * len(columns))
    for name in columns[0]:
        print(f"| {name} |" + "".join(f" {column[name]} |" for column in columns))


def measure(size: int) -> dict[str, str]:
    """Return a column of the table."""
    start, store, others = measure_start(size), measure_store(size), measure_others(size)
    with tempfile.TemporaryDirectory() as directory:
        saves = measure_saves(World(size), Path(directory))
    gc.collect()
    return {
        "start: process groups made by every rank": f"{start.groups:,}",
        "of these a rank is a member of": f"{start.own:,}",
        "seconds to make them, without connections": f"{start.seconds:.2f}",
        "heartbeat: keys in the store": f"{store.keys:,}",
        "bytes that a rank sends in a beat": f"{store.note:,}",
        "seconds of the store for all of a beat": f"{store.beat:.2f}",
        "ranks wait for long: seconds of the one that reads all notes": f"{store.read:.2f}",
        "bytes that each other one reads": f"{store.findings:,}",
        "save: files": f"{saves.files:,}",
        "entries of the index": f"{saves.entries:,}",
        "index, MB": f"{saves.index / 1e6:.1f}",
        "checksum file, MB": f"{saves.checksums / 1e6:.2f}",
        "first save: KB that the busiest rank sends to rank 0": f"{saves.message / 1e3:.0f}",
        "MB that rank 0 gets": f"{saves.all_messages / 1e6:.1f}",
        "seconds of rank 0": f"{saves.first:.2f}",
        "each later save: seconds of rank 0": f"{saves.later:.2f}",
        "resume: seconds to read the index, on every rank": f"{saves.read:.2f}",
        "seconds to divide the files among ranks": f"{start.division:.3f}",
        "first step: bytes that a rank exchanges in its check": f"{others.first_step}",
        "data: seconds of rank 0 to build the maps of 1,000 steps, a sequence a rank": f"{others.maps:.2f}",
        "questions of waiting ranks a second, after 50 s": f"{others.questions:,.0f}",
        "a hang: lines, at most": f"{others.lines}",
    }


if __name__ == "__main__":
    run_command(main)
