"""The memory that a step holds: every storage counts once, as long as anything refers to it."""

import sys
from collections import Counter

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves


class StorageLog:
    """Storages made since the log began, and the most bytes that lived at once."""

    def __init__(self) -> None:
        self.peak = 0
        """Most bytes that lived at once since the last `restart`."""
        self.at_peak: Counter[str] = Counter()
        """These bytes by the place that made them; those made before the last `restart` are left out."""
        self._made: dict[int, tuple[StorageWeakRef, str]] = {}
        self._bound = 0

    def add(self, given: object, result: object) -> None:
        """Note the storages of an operation's result that were not among its arguments."""
        before = storages_in(given)
        for key, storage in storages_in(result).items():
            if key not in before and (key not in self._made or self._made[key][0].expired()):
                self._made[key] = StorageWeakRef(storage), place()
                self._bound += storage.nbytes()
        # Nothing that was freed is noticed until the sum of all that was made passes the peak.
        if self._bound > self.peak:
            live = self.live()
            self._bound = sum(live.values())
            if self._bound > self.peak:
                self.peak, self.at_peak = self._bound, live

    def live(self) -> Counter[str]:
        """Bytes of the storages that still exist, by place; under the empty one those made before `restart`."""
        total: Counter[str] = Counter()
        for key, (reference, where) in list(self._made.items()):
            storage = None if reference.expired() else torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._made[key]
            else:
                total[where] += storage.nbytes()
        return total

    def restart(self) -> int:
        """Begin a new peak at what lives now, whose bytes are returned."""
        self.peak = self._bound = sum(self.live().values())
        self._made = {key: (reference, "") for key, (reference, _) in self._made.items()}
        self.at_peak = Counter({"": self.peak})
        return self.peak


OWN_PLACES = ("/megatron_moe_lpr/", "/megatron/core/")
PASSED_BY = ("/megatron_moe_lpr/rehearsal/", "/megatron_moe_lpr/platform/simulated")


def place(depth: int = 1) -> str:
    """The innermost frame of this package or of Megatron-Core that the caller runs in: `file.py:line in function`.

    Args:
        depth: frames of the caller to pass by.
    """
    frame = sys._getframe(depth)
    while frame is not None:
        path = frame.f_code.co_filename
        if any(own in path for own in OWN_PLACES) and not any(other in path for other in PASSED_BY):
            name = next(path.rpartition(own)[2] for own in OWN_PLACES if own in path)
            return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def storages_in(values: object) -> dict[int, torch.UntypedStorage]:
    """Storages of all tensors in a nested structure, by address of their object."""
    found = {}
    for leaf in tree_leaves(values):
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            found[storage._cdata] = storage
    return found
