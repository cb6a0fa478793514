"""torchrun for batch systems: same flags, but SIGUSR1 reaches the workers and their exit code comes back.

torchrun itself dies of SIGUSR1, leaving its workers behind, and turns every exit code of theirs into 1.

    python -m megatron_moe_lpr.launch --nproc-per-node 8 -m megatron_moe_lpr.pretrain --stage 1 ...
"""

import signal
import sys
from collections.abc import Sequence

import psutil
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_moe_lpr.training.signals import EXIT_REQUEUE


def forward_to_workers(number: int, frame: object) -> None:
    """Hand a signal on to the workers, told from torchrun's other children by their rank."""
    for child in psutil.Process().children():
        try:
            if "LOCAL_RANK" in child.environ():
                child.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def exit_code(codes: Sequence[int]) -> int:
    """One exit code for a node from its workers' (negative: died of that signal).

    A worker that SIGUSR1 reaches before it can save dies of it: that run too was asked to stop. As soon as one worker
    has left, torchrun ends the slower ones by SIGTERM. Any other code is a failure, and outweighs its peers' request to
    be started again.
    """
    asked_to_stop = {EXIT_REQUEUE, -signal.SIGUSR1}
    if asked_to_stop.intersection(codes):
        asked_to_stop.add(-signal.SIGTERM)
    failures = [code for code in codes if code not in asked_to_stop]
    if not failures:
        return EXIT_REQUEUE
    return failures[0] if failures[0] > 0 else 128 - failures[0]


def main(arguments: list[str] | None = None) -> None:
    """Start the workers as torchrun does and wait for them."""
    signal.signal(signal.SIGUSR1, forward_to_workers)
    try:
        torchrun.main(arguments)
    except ChildFailedError as error:
        code = exit_code([failure.exitcode for failure in error.failures.values()])
        if code != EXIT_REQUEUE:
            print(error, file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()
