"""torchrun for batch systems: same flags, but a signal makes the workers save, and their exit code comes back.

torchrun itself dies of SIGUSR1, gives workers 30 seconds after SIGTERM, and turns every exit code of theirs into 1.

    moe-lpr launch --nproc-per-node 8 train --stage 1 ...

In front of `train` (or `evaluate`) stand torchrun's own flags. Without the installed command the same is:

    python -m megatron_moe_lpr.launch --nproc-per-node 8 -m megatron_moe_lpr.pretrain --stage 1 ...
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import psutil

from megatron_moe_lpr.errors import UserError, fail
from megatron_moe_lpr.launch_checks import check_launch
from megatron_moe_lpr.pretrain import LAUNCHER
from megatron_moe_lpr.training.signals import EXIT_REQUEUE, StopRequest

TRAINING = "megatron_moe_lpr.pretrain"
RANK_COMMANDS = {"train": ("-m", TRAINING), "evaluate": ("-m", "megatron_moe_lpr.commands.evaluate")}
"""Subcommands that run on several ranks, as torchrun takes them."""
FLAGS_WITHOUT_VALUE = ("--standalone", "--no-python", "--no_python", "--run-path", "--run_path", "-m", "--module")
"""Flags of torchrun that the next word is no value of."""
SIGNALS_OF_TORCHRUN = "--signals-to-handle"
LINES_SHOWN = 12
"""Of each rank, when a run has failed."""


class ForwardedStop(StopRequest):
    """Hands each request on to the workers. Without workers there is nothing to save."""

    def __init__(self) -> None:
        super().__init__(nothing_to_save=True)

    def _receive(self, number: int, frame: object) -> None:
        for worker in workers():
            try:
                worker.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        super()._receive(number, frame)

    def may_leave(self) -> bool:
        """Whether no worker runs."""
        return not workers()


def workers() -> list[psutil.Process]:
    """torchrun's workers, told from its other children by their rank."""
    found = []
    for child in psutil.Process().children():
        try:
            if "LOCAL_RANK" in child.environ():
                found.append(child)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def exit_code(codes: Sequence[int], asked: bool = False) -> int:
    """One exit code for a node from its workers' (negative: died of that signal).

    A worker that a signal reaches before it can save dies of it: that run too was asked to stop. As soon as one worker
    has left, torchrun ends the slower ones by SIGTERM. Any other code is a failure, and outweighs its peers' request to
    be started again.

    Args:
        asked: whether this launcher was asked to stop.
    """
    asked_to_stop = {EXIT_REQUEUE, -signal.SIGUSR1}
    if asked or asked_to_stop.intersection(codes):
        asked_to_stop.add(-signal.SIGTERM)
    failures = [code for code in codes if code not in asked_to_stop]
    if not failures:
        return EXIT_REQUEUE
    return failures[0] if failures[0] > 0 else 128 - failures[0]


def main(arguments: list[str] | None = None) -> None:
    """Start the workers as torchrun does and wait for them."""
    stop, since = ForwardedStop(), time.time()
    arguments = spell_out(list(sys.argv[1:] if arguments is None else arguments))
    check_training_flags(arguments)
    # After the handlers and the flags: this takes seconds.
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    flags = _checked_flags(torchrun, arguments)
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        torchrun.main(_keep_signals(torchrun, arguments))
    except ChildFailedError as error:
        code = exit_code([failure.exitcode for failure in error.failures.values()], stop.received is not None)
        if code != EXIT_REQUEUE:
            print(error, file=sys.stderr)
            _print_last_lines(flags, since)
        sys.exit(code)
    except DistError as error:
        # Another program has taken the port since the check, or the first node does not answer.
        fail(f"--master-addr {flags.master_addr} --master-port {flags.master_port}: {str(error).splitlines()[0]}")
    except SignalException as caught:
        sys.exit(EXIT_REQUEUE if caught.sigval in (signal.SIGTERM, signal.SIGUSR1) else 128 + caught.sigval)


def spell_out(arguments: Sequence[str]) -> list[str]:
    """Return torchrun's arguments, with the module in place of `train` or `evaluate` behind torchrun's own flags."""
    for place, word in enumerate(arguments):
        before = arguments[place - 1] if place else ""
        is_value = before.startswith("-") and "=" not in before and before not in FLAGS_WITHOUT_VALUE
        if word.startswith("-") or is_value:
            continue
        # The first word of its own is what torchrun starts; all behind it is not torchrun's.
        return [*arguments[:place], *RANK_COMMANDS.get(word, (word,)), *arguments[place + 1 :]]
    return list(arguments)


def _checked_flags(torchrun: ModuleType, arguments: list[str]) -> argparse.Namespace:
    """torchrun's own flags; a mistake in them ends the process."""
    flags: argparse.Namespace = torchrun.get_args_parser().parse_args(arguments)
    try:
        check_launch(flags)
        torchrun.determine_local_world_size(flags.nproc_per_node)  # what `gpu` means here
    except UserError as error:
        fail(str(error), code=2)
    except ValueError as error:
        fail(f"--nproc-per-node {flags.nproc_per_node}: {error}", code=2)
    return flags


def check_training_flags(arguments: Sequence[str]) -> None:
    """Tell a mistake in the flags of a training once and at once, instead of by each rank after torchrun's start.

    A mistake, and --help among them, end the process as they end `megatron_moe_lpr.pretrain`.
    """
    if TRAINING not in arguments:
        return
    from megatron_moe_lpr import pretrain
    from megatron_moe_lpr.training.configuration.config_file import parse_training_flags

    parse_training_flags(arguments[arguments.index(TRAINING) + 1 :], pretrain.__doc__)


def _keep_signals(torchrun: ModuleType, arguments: list[str]) -> list[str]:
    """Keep torchrun from taking SIGTERM: it would end workers that take longer than 30 seconds to save."""
    known = any(SIGNALS_OF_TORCHRUN in action.option_strings for action in torchrun.get_args_parser()._actions)
    return [f"{SIGNALS_OF_TORCHRUN}=SIGINT,SIGHUP,SIGQUIT", *arguments] if known else arguments


def _print_last_lines(flags: argparse.Namespace, since: float) -> None:
    """The end of what each rank of this node said, from torchrun's log files, but for ranks that were shown already."""
    if flags.log_dir is None or (flags.tee != "0" and not flags.local_ranks_filter):
        return
    shown = flags.local_ranks_filter.split(",") if flags.tee != "0" else []
    runs = [path for path in Path(flags.log_dir).glob("*/attempt_*") if path.stat().st_mtime >= since - 1]
    for attempt in sorted(runs, key=lambda path: path.stat().st_mtime)[-1:]:
        for directory in sorted(attempt.iterdir(), key=lambda path: path.name.zfill(9)):
            for name in ("stdout.log", "stderr.log"):
                lines = last_lines(directory / name)
                if lines and directory.name not in shown:
                    print(f"--- local rank {directory.name}, end of {name}", *lines, sep="\n", file=sys.stderr)


def last_lines(path: Path, count: int = LINES_SHOWN) -> list[str]:
    """The last lines of a text file; none where there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 256 * count))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []


if __name__ == "__main__":
    main()
