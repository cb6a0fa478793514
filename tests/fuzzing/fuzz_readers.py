"""Fuzz every reader of this project for some minutes: print how many files were read, stop at the first that does harm.

python -m tests.fuzzing.fuzz_readers --minutes 5
"""

import dataclasses
import resource
import time

from megatron_moe_lpr.command_line import parse_flags
from tests.fuzzing.running import fuzz
from tests.fuzzing.targets import TARGETS

INPUTS_A_ROUND = 300
GIGABYTES = 4
"""Memory limit beyond what the imports take; a reader that allocates more gets a MemoryError, which is reported."""


@dataclasses.dataclass
class Flags:
    """Options of a fuzzing run."""

    minutes: float = 5.0
    """About how long to run."""
    seed: int = 0
    """Seed of the first round; each further round adds 1."""


def main() -> None:
    flags = parse_flags(Flags, description=__doc__)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTES * 10**9,) * 2)
    totals = {name: {"read": 0, "refused": 0} for name in TARGETS}
    start, number = time.monotonic(), flags.seed
    while time.monotonic() - start < 60 * flags.minutes:
        for name, total in totals.items():
            for kind, count in fuzz(name, INPUTS_A_ROUND, number).items():
                total[kind] += count
        number += 1
    for name, total in totals.items():
        print(f"{name:24} {total['read']:8,} read, {total['refused']:8,} refused")
    print(f"{sum(total['read'] for total in totals.values()):,} hostile files in {time.monotonic() - start:,.0f} s")


if __name__ == "__main__":
    main()
