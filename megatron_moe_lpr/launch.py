"""torchrun for batch systems: same flags, but a signal makes the workers save, and their exit code is returned.

torchrun itself dies of SIGUSR1, kills workers 30 seconds after SIGTERM, and returns 1 for every exit code of theirs.

    moe-lpr launch --nproc-per-node 8 train --stage 1 ...

torchrun's own flags come before `train` (or `evaluate`, `generate`). Without the installed command the same is:

    python -m megatron_moe_lpr.launch --nproc-per-node 8 -m megatron_moe_lpr.pretrain --stage 1 ...
"""

import argparse
import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

import psutil

from megatron_moe_lpr.errors import BROKEN_PIPE_CODE, INTERRUPTED_CODE, UserError, fail
from megatron_moe_lpr.launch_checks import check_launch, node_range
from megatron_moe_lpr.pretrain import LAUNCHER
from megatron_moe_lpr.training.signals import EXIT_REQUEUE, StopRequest

if TYPE_CHECKING:
    from megatron_moe_lpr.training.configuration.config import TrainingConfig

TRAINING = "megatron_moe_lpr.pretrain"
RANK_COMMANDS = {
    "train": ("-m", TRAINING),
    "evaluate": ("-m", "megatron_moe_lpr.commands.evaluate"),
    "generate": ("-m", "megatron_moe_lpr.commands.generate"),
}
"""Subcommands that run on several ranks, by what torchrun must start for them."""
ENDED_BY_USER = (BROKEN_PIPE_CODE, INTERRUPTED_CODE)
"""Exit codes that say all: the reader of the output has gone, or Ctrl-C."""
FLAGS_WITHOUT_VALUE = ("--standalone", "--no-python", "--no_python", "--run-path", "--run_path", "-m", "--module")
"""Flags of torchrun without a value in the next word."""
SIGNALS_OF_TORCHRUN = "--signals-to-handle"
LINES_SHOWN = 12
"""Last lines of each rank's output that are printed when a run has failed."""
OPEN_FILES = 65536
"""Enough for the store that the first node's launcher keeps, with two connections of each rank."""


class ForwardedStop(StopRequest):
    """Forwards each signal to the workers; without workers there is nothing to save, and the launcher ends."""

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
        """Whether no worker is running, so that the launcher may end at once."""
        return not workers()


def workers() -> list[psutil.Process]:
    """Return torchrun's workers: the child processes that have a rank in their environment."""
    found = []
    for child in psutil.Process().children():
        try:
            if "LOCAL_RANK" in child.environ():
                found.append(child)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def exit_code(codes: Sequence[int], asked: bool = False) -> int:
    """Return the exit code of a node from the codes of its workers (negative: killed by that signal).

    A worker that gets a signal before it can save dies of it; that run was asked to stop too. As soon as one worker
    has ended, torchrun ends the slower ones by SIGTERM. Any other code is a failure, and counts more than the request
    of other workers to be started again.

    Args:
        asked: whether this launcher received a signal to stop.
    """
    stop_codes = {EXIT_REQUEUE, -signal.SIGUSR1}
    if asked or stop_codes.intersection(codes):
        stop_codes.add(-signal.SIGTERM)
    failures = [code for code in codes if code not in stop_codes]
    if not failures:
        return EXIT_REQUEUE
    return failures[0] if failures[0] > 0 else 128 - failures[0]


def main(arguments: list[str] | None = None) -> None:
    """Start the workers as torchrun does and wait for them."""
    stop, since = ForwardedStop(), time.time()
    allow_connections()
    arguments = spell_out(list(sys.argv[1:] if arguments is None else arguments))
    config = check_training_flags(arguments)
    # Imported after the signal handlers and the check of flags, since it takes seconds.
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    from megatron_moe_lpr.launch_restarts import install

    flags = _checked_flags(torchrun, arguments, config)
    agent = install(stop, exit_code, node_range(flags.nnodes)[1] > 1)
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        torchrun.main(_keep_signals(torchrun, arguments))
    except ChildFailedError as error:
        code = exit_code([failure.exitcode for failure in error.failures.values()], stop.received is not None)
        if code not in (EXIT_REQUEUE, *ENDED_BY_USER):
            print(error, file=sys.stderr)
            _print_last_lines(flags, since)
        sys.exit(code)
    except RendezvousError as error:
        end_without_rendezvous(error, flags.rdzv_endpoint, agent.last_code)
    except DistError as error:
        # Another program has taken the port since the check, or the first node cannot be reached.
        fail(f"--master-addr {flags.master_addr} --master-port {flags.master_port}: {str(error).splitlines()[0]}")
    except SignalException as caught:
        sys.exit(EXIT_REQUEUE if caught.sigval in (signal.SIGTERM, signal.SIGUSR1) else 128 + caught.sigval)


def end_without_rendezvous(error: Exception, endpoint: str, code: int) -> NoReturn:
    """End this launcher where its node cannot meet the others (again).

    Args:
        error: torch's `RendezvousError`.
        code: exit code of this node's workers, if they have ended.
    """
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousTimeoutError

    if isinstance(error, RendezvousClosedError) and code == EXIT_REQUEUE:
        sys.exit(EXIT_REQUEUE)  # the other node was asked to stop, and so this one's workers have saved
    where = f"--rdzv-endpoint {endpoint}"
    if isinstance(error, RendezvousClosedError):
        message = f"{where}: another node has ended the run, or an earlier run of this --rdzv-id; see its output"
    elif isinstance(error, RendezvousTimeoutError):
        message = f"{where}: fewer nodes than --nnodes asks for have come in time (--rdzv-conf join_timeout=SECONDS)"
    else:
        message = f"{where}: no connection to the node that holds the rendezvous; the run cannot go on without it"
    fail(message, code=code if code not in (0, EXIT_REQUEUE) else 1)


def allow_connections() -> None:
    """Raise this process's limit of open files, as far as its hard limit allows and a large run needs.

    With the usual limit of 1,024 the store of torch.distributed could not serve 512 ranks, which connect to it twice.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def spell_out(arguments: Sequence[str]) -> list[str]:
    """Return torchrun's arguments, with the module in place of `train` or `evaluate` behind torchrun's own flags."""
    for place, word in enumerate(arguments):
        before = arguments[place - 1] if place else ""
        is_value = before.startswith("-") and "=" not in before and before not in FLAGS_WITHOUT_VALUE
        if word.startswith("-") or is_value:
            continue
        # The first word that is neither a flag nor a value is what torchrun starts; the rest are arguments of that.
        return [*arguments[:place], *RANK_COMMANDS.get(word, (word,)), *arguments[place + 1 :]]
    return list(arguments)


def _checked_flags(
    torchrun: ModuleType, arguments: list[str], config: "TrainingConfig | None" = None
) -> argparse.Namespace:
    """Parse and check torchrun's own flags, with those of a training; a mistake in them ends the process."""
    flags: argparse.Namespace = torchrun.get_args_parser().parse_args(arguments)
    try:
        check_launch(flags)
        ranks = torchrun.determine_local_world_size(flags.nproc_per_node)  # what `gpu` means here
        if config is not None:
            check_node_counts(config, flags.nnodes, ranks)
    except UserError as error:
        fail(str(error), code=2)
    except ValueError as error:
        fail(f"--nproc-per-node {flags.nproc_per_node}: {error}", code=2)
    return flags


def check_node_counts(config: "TrainingConfig", nnodes: str, ranks_per_node: int) -> None:
    """Check that the training can run on every number of nodes in a value of --nnodes.

    Raises:
        UserError: on some it cannot, since its layout or its global batch does not come out even.
    """
    from megatron_moe_lpr.training.configuration.rank_counts import describe_fitting, why_not_on

    least, most = node_range(nnodes)
    for nodes in range(least, most + 1) if least < most else ():
        if reason := why_not_on(config, nodes * ranks_per_node):
            raise UserError(
                f"--nnodes {nnodes}: torchrun may start on {nodes} nodes, where {reason}; "
                f"{describe_fitting(config, ranks_per_node, most)}"
            )


def check_training_flags(arguments: Sequence[str]) -> "TrainingConfig | None":
    """Check the flags of a training before torchrun starts, so that a mistake is reported once instead of by each rank.

    A mistake, or --help among the flags, ends the process as it ends `megatron_moe_lpr.pretrain`.

    Returns:
        The training's configuration; None where another program is started.
    """
    if TRAINING not in arguments:
        return None
    from megatron_moe_lpr import pretrain
    from megatron_moe_lpr.training.configuration.config_file import parse_training_flags

    return parse_training_flags(arguments[arguments.index(TRAINING) + 1 :], pretrain.__doc__)


def _keep_signals(torchrun: ModuleType, arguments: list[str]) -> list[str]:
    """Keep torchrun from handling SIGTERM: it would kill workers that take longer than 30 seconds to save."""
    known = any(SIGNALS_OF_TORCHRUN in action.option_strings for action in torchrun.get_args_parser()._actions)
    return [f"{SIGNALS_OF_TORCHRUN}=SIGINT,SIGHUP,SIGQUIT", *arguments] if known else arguments


def _print_last_lines(flags: argparse.Namespace, since: float) -> None:
    """Print the last lines of each rank's log files on this node, except for ranks whose output was shown already."""
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
    """Return the last lines of a text file; none where there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 256 * count))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []


if __name__ == "__main__":
    main()
