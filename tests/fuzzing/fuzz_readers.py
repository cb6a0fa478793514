"""Read hostile files with every reader of our own for some minutes; prints how many, and stops at the first that harms.

python tests/fuzzing/fuzz_readers.py --minutes 5
"""

import dataclasses
import resource
import time

from megatron_moe_lpr.command_line import parse_flags
from tests.fuzzing.running import fuzz
from tests.fuzzing.targets import TARGETS

INPUTS_A_ROUND = 300
GIGABYTES = 4
"""Of memory beyond what the imports take: a reader that asks for more gets a MemoryError, which is reported."""


@dataclasses.dataclass
class Flags:
    """Read hostile files with every reader of our own."""

    minutes: float = 5.0
    """How long, about."""
    seed: int = 0
    """Of the first round; each round takes the next."""


def main() -> None:
    flags = parse_flags(Flags, description=__doc__)
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + GIGABYTES * 10**9,) * 2)
    totals = {name: {"read": 0, "refused": 0} for name in TARGETS}
    start, number = time.monotonic(), flags.seed
    while time.monotonic() - start < 60 * flags.minutes:
        for name, total in totals.items():
            for what, count in fuzz(name, INPUTS_A_ROUND, number).items():
                total[what] += count
        number += 1
    for name, total in totals.items():
        print(f"{name:24} {total['read']:8,} read, {total['refused']:8,} refused")
    print(f"{sum(total['read'] for total in totals.values()):,} hostile files in {time.monotonic() - start:,.0f} s")


if __name__ == "__main__":
    main()
