"""A real language model extended to new languages, and other methods beside it. `make real` runs it.

    python -m examples.real.real [STAGE]

It may be interrupted at any time: the same command continues. To start over, remove the directory runs/real. Settings
are in examples/real/settings.yaml.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import tyro
from workflow import Failed

from examples.real import measure, report
from examples.real.base import base
from examples.real.flow import Flow
from examples.real.layers import compare_layers
from examples.real.mixture import EXTENDED, extend
from examples.real.others import others
from examples.real.settings import read_settings
from examples.real.tokenizer import tokenizer
from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import INTERRUPTED_CODE, run_command

ROOT = Path(__file__).parents[2]


def moe_lpr(flow: Flow) -> None:
    """Compare layers, then make the extended model."""
    compare_layers(flow)
    extend(flow, EXTENDED)


def measure_models(flow: Flow) -> None:
    """Measure all models."""
    measure.run(flow.runs, flow.settings)


def write_report(flow: Flow) -> None:
    """Write the page and the tables."""
    report.run(flow.runs, flow.settings)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the whole."""

    action: Callable[[Flow], None]
    needs: tuple[str, ...] = ()
    """Stages that come before it."""


STAGES = {
    "base": Stage(base),
    "tokenizer": Stage(tokenizer, ("base",)),
    "moe-lpr": Stage(moe_lpr, ("tokenizer",)),
    "others": Stage(others, ("tokenizer",)),
    "measure": Stage(measure_models, ("moe-lpr", "others")),
    "report": Stage(write_report, ("measure",)),
}
"""All stages, in the order in which they run."""


@dataclasses.dataclass(frozen=True)
class Flags:
    """Run a stage and what it needs; without a name, all of them."""

    stage: tyro.conf.Positional[Literal[("all", *STAGES)]] = "all"
    """Stage to run."""


def plan(stage: str) -> list[str]:
    """Return the stages to run, in their order: all, or one with those that it needs."""
    wanted = set(STAGES) if stage == "all" else {stage}
    for name in reversed(STAGES):
        if name in wanted:
            wanted.update(STAGES[name].needs)
    return [name for name in STAGES if name in wanted]


def main() -> None:
    """Run the stages that the command line asks for."""
    stage = parse_flags(Flags, description=__doc__).stage
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    flow, start = Flow(read_settings()), time.monotonic()
    try:
        for name in plan(stage):
            flow.say(f"==== stage {name}")
            STAGES[name].action(flow)
    except Failed as failure:
        sys.exit(failure.code)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(INTERRUPTED_CODE)
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    flow.say(f"took {minutes} min {seconds} s; everything is in {flow.runs}")


if __name__ == "__main__":
    run_command(main)
