"""Work of rank 0 that may take longer than any collective operation: the others wait outside of collectives."""

import itertools
import time
from collections.abc import Callable

import torch.distributed as dist

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.liveness import long_work, waiting_for

POLL_SECONDS = 0.2
_calls = itertools.count()


def run_on_rank_0(action: Callable[[], object], description: str) -> None:
    """Run `action` on rank 0, and return on every rank when it is done; alone without process groups.

    A barrier would fail after --distributed-timeout-minutes, however well the work goes: here the others look into the
    store that the ranks met in. Every rank must call it.

    Args:
        description: what rank 0 does, for the message of a rank that hangs.

    Raises:
        UserError: `action` failed, on every rank with the reason. What else it raises, rank 0 raises.
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
