"""The demo: the whole method on real text, on a CPU, and other methods beside it. `make demo` runs it.

    python examples/demo/demo.py TARGET

It may be interrupted at any time: the same command continues. To start over, remove the target's directory, for example
runs/demo. Settings are environment variables (examples/demo/settings.py), as in STAGE1_ITERS=1000.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import tyro
from base_model import base_model
from growing import growing
from instruct import instruct
from method import baselines, demo, full, report
from mixture import mixture
from other_evaluations import choices, other_text
from paper_table import paper_table
from scaling import scaling
from vocabulary import vocabulary
from vocabulary_reviews import vocabulary_reviews
from workflow import Failed

from megatron_moe_lpr.command_line import parse_flags

ROOT = Path(__file__).parents[2]
TARGETS: dict[str, Callable[[], object]] = {
    "demo": demo,
    "full": full,
    "baselines": baselines,
    "report": report,
    "paper-table": paper_table,
    "scaling": scaling,
    "growing": growing,
    "mixture": mixture,
    "vocabulary": vocabulary,
    "vocabulary-reviews": vocabulary_reviews,
    "instruct": instruct,
    "other-text": other_text,
    "choices": choices,
    "base-model": base_model,
}


@dataclasses.dataclass(frozen=True)
class Flags:
    """Run a target of the demo."""

    target: tyro.conf.Positional[Literal[tuple(TARGETS)]]
    """Target to run."""


def main() -> None:
    """Run the target that the command line names."""
    target = parse_flags(Flags, description=__doc__).target
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start = time.monotonic()
    try:
        TARGETS[target]()
    except Failed as failure:
        sys.exit(failure.code)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    print(f"took {minutes} min {seconds} s")


if __name__ == "__main__":
    main()
