"""Work of rank 0 that may take longer than a collective's time-out: the others wait without a collective."""

import itertools
import time
from collections.abc import Callable

import torch.distributed as dist

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.liveness import long_work, waiting_for

POLL_SECONDS = 0.2
_calls = itertools.count()


def run_on_rank_0(action: Callable[[], object], description: str) -> None:
    """Run `action` on rank 0, and return on every rank when it has ended; without process groups in this process.

    A barrier would fail after --distributed-timeout-minutes although the work goes on. Here the other ranks poll the
    store of torch.distributed's rendezvous. Every rank must call it.

    Args:
        description: the work of rank 0, for the message about a rank that hangs.

    Raises:
        UserError: on every rank, with the reason, where `action` raised one. Any other error is raised on rank 0, and
            the others raise a UserError.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        with long_work(description):
            action()
        return
    store, key = dist.distributed_c10d._get_default_store(), f"moe_lpr/rank_0/{next(_calls)}"
    if dist.get_rank() == 0:
        reason = "rank 0 has failed"
        try:
            with long_work(description):
                action()
            reason = ""
        except UserError as error:
            reason = str(error)
            raise
        finally:
            store.set(key, reason)
    else:
        with waiting_for(f"{description} on rank 0", on_peers=True):
            while not store.check([key]):
                time.sleep(POLL_SECONDS)
        if reason := store.get(key).decode():
            raise UserError(reason)


def restart_count() -> None:
    """Count the calls from 0 again, for a process that becomes another rank (`rehearsal`)."""
    global _calls
    _calls = itertools.count()
