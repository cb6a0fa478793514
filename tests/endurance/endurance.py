#!/usr/bin/env python3
"""A run that is killed, stopped, damaged and hung forty times, beside one that is left alone.

A tiny model trains on two ranks and saves every few steps. Again and again something is done to it, at a random moment
or when a certain file of a checkpoint appears; what must follow is checked, and the run is started again. Every step
that any start has logged must equal the undisturbed run's to the bit. Prints a table of faults and outcomes; the exit
code is 1 where anything was missed.

    python -m tests.endurance.endurance --work /tmp/endurance            # all faults, as root also a full disk
    python -m tests.endurance.endurance --work /tmp/endurance --short    # one of each kind that needs no waiting
"""

import dataclasses
import random
import shutil
import sys
import time
from pathlib import Path

from megatron_moe_lpr.command_line import parse_flags
from tests.endurance.faults import FAULTS, SHORT, Failure, Fault
from tests.endurance.run import Inputs, TrainingRun, make_inputs, reference_steps

STEPS_OF_A_FAULT = 15
"""More than pass before a fault is over."""


@dataclasses.dataclass
class Flags:
    """Faults against a real run."""

    work: Path
    """A directory for runs; what an earlier call left there is removed."""
    again: bool = False
    """Keep the model, the data and the undisturbed run that an earlier call has left in --work."""
    short: bool = False
    """Only the faults of the short form."""
    only: str | None = None
    """Only faults whose name contains this."""
    seed: int = 0
    """Of the random moments."""


@dataclasses.dataclass
class Outcome:
    """What came of one fault."""

    fault: str
    passed: bool
    words: str
    seconds: float


def main() -> None:
    flags = parse_flags(Flags, description=__doc__)
    faults = [fault for fault in (SHORT if flags.short else FAULTS) if not flags.only or flags.only in fault.name]
    outcomes = endure(flags.work, faults, flags.seed, again=flags.again)
    print_table(outcomes)
    sys.exit(any(not outcome.passed for outcome in outcomes))


def endure(work: Path, faults: list[Fault], seed: int = 0, again: bool = False) -> list[Outcome]:
    """Do all faults, one after the other, to runs in `work`."""
    generator = random.Random(seed)
    if not again:
        shutil.rmtree(work, ignore_errors=True)
    inputs = make_inputs(work)
    begin = time.monotonic()
    expected = reference_steps(inputs)
    print(f"undisturbed run: {len(expected)} steps in {time.monotonic() - begin:.0f} s", flush=True)
    campaign = Campaign(inputs, expected)
    outcomes = []
    for number, fault in enumerate(faults, 1):
        outcomes.append(campaign.suffer(fault, generator))
        print(f"{number}/{len(faults)} {_line(outcomes[-1])}", flush=True)
    outcomes.append(campaign.finish())
    print(_line(outcomes[-1]), flush=True)
    return outcomes


def _line(outcome: Outcome) -> str:
    return f"{outcome.fault}: {'ok' if outcome.passed else 'MISSED'}, {outcome.words}, {outcome.seconds:.0f} s"


class Campaign:
    """One run after another, each disturbed until it has come to its end in spite of everything."""

    def __init__(self, inputs: Inputs, expected: dict[int, dict[str, float]]) -> None:
        self.inputs, self.expected, self.count = inputs, expected, 0
        self.run = self._new_run()

    def _new_run(self) -> TrainingRun:
        self.count += 1
        shutil.rmtree(self.inputs.work / f"run{self.count}", ignore_errors=True)
        return TrainingRun(self.inputs, self.inputs.work / f"run{self.count}")

    def suffer(self, fault: Fault, generator: random.Random) -> Outcome:
        """Start the run where it is, do the fault, and check what follows."""
        begin = time.monotonic()
        if len(self.expected) - (self.run.latest() or 0) < STEPS_OF_A_FAULT:
            self.run = self._new_run()
        before = self.run.latest()
        words, passed = "", True
        try:
            words = fault.do(self.run, generator)
            self._check(before, fault)
        except Failure as failure:
            passed, words = False, str(failure)
        finally:
            if survivors := self.run.kill_all():
                passed, words = False, f"{words}; still alive: {survivors}"
        if not passed:
            self.run.keep_output(fault.name)
        return Outcome(fault.name, passed, words, time.monotonic() - begin)

    def _check(self, before: int | None, fault: Fault) -> None:
        """What holds after every fault."""
        self.run.wait_until_all_ended()
        self.run.check_steps(self.expected)
        after = self.run.latest() or 0
        if after < (before or 0) and not fault.may_lose_checkpoints:
            raise Failure(f"the latest checkpoint went back from step {before} to {after}")

    def finish(self) -> Outcome:
        """Let the last run come to its end and look at everything again."""
        begin = time.monotonic()
        try:
            code = self.run.start().wait()
            if code:
                raise Failure(f"the run does not finish: exit code {code}: {self.run.tail()}")
            self.run.wait_until_all_ended()
            self.run.check_steps(self.expected)
            missing = self.expected.keys() - self.run.steps().keys()
            partial = self.run.partial_directories()
            if missing or partial:
                raise Failure(f"missing steps {sorted(missing)[:5]}, left behind: {partial}")
        except Failure as failure:
            self.run.keep_output("end")
            return Outcome("undisturbed to the end", False, str(failure), time.monotonic() - begin)
        words = f"all {len(self.expected)} steps equal to the bit, nothing left behind"
        return Outcome("undisturbed to the end", True, words, time.monotonic() - begin)


def print_table(outcomes: list[Outcome]) -> None:
    """Faults of one kind in one row."""
    kinds: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        kinds.setdefault(outcome.fault, []).append(outcome)
    print("\n| fault | times | as promised |\n|---|---|---|")
    for kind, members in kinds.items():
        print(f"| {kind} | {len(members)} | {sum(member.passed for member in members)} |")
    print(f"| **all** | {len(outcomes)} | {sum(outcome.passed for outcome in outcomes)} |")
    for outcome in outcomes:
        if not outcome.passed:
            print(f"\nMISSED {outcome.fault}: {outcome.words}")


if __name__ == "__main__":
    main()
