"""What a rehearsed rank is recorded to have done: its collectives, memory, files and share of the data."""

import dataclasses
from typing import Any, Literal

Phase = Literal["start", "step", "save", "resume", "evaluate"]
PHASES: tuple[Phase, ...] = ("start", "step", "save", "resume", "evaluate")
"""Parts of a run, in the order in which a rank is rehearsed."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One call of torch.distributed, as the calling rank makes it."""

    kind: str
    """all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, reduce, gather, scatter, send, recv, barrier,
    all_gather_object, gather_object, broadcast_object or scatter_object."""
    ranks: tuple[int, ...]
    """Global ranks of the group, in the group's order."""
    group: str
    """Megatron's name of the group: world, tp, pp, ep, dp, expt_dp and so on."""
    dtype: str
    """Without `torch.`; empty: the call moves no tensor, as a barrier does, or Python objects."""
    bytes: int
    """Bytes of the tensors that this rank hands in; of a receiving rank those that it gets. 0: no tensor."""
    sizes: tuple[int, ...] | None = None
    """Of an all_to_all: elements sent to each rank of the group."""
    received: tuple[int, ...] | None = None
    """Of an all_to_all: elements received from each rank of the group."""
    peer: int | None = None
    """Global rank: of send and recv the other one, of broadcast, reduce, gather and scatter the root."""
    phase: str = "step"
    """See PHASES."""
    site: str = ""
    """`file.py:line in function` of the innermost frame in this package or in Megatron-Core."""
    awaited: int | None = None
    """Of a send or recv that returns before it is done: how many further calls the rank made before it waited for it.
    None: it was waited for in the call, or together with the sends and receives that follow it from the same site
    (torch's `batch_isend_irecv`)."""


@dataclasses.dataclass
class RankRecord:
    """Everything recorded of one rehearsed rank."""

    rank: int
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    """In the order of the calls."""
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    """Bytes of `parameters`, `gradients`, `optimizer` and `activations` (at the peak)."""
    files: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    """Path below the checkpoint's directory and bytes of each file that a save writes on this rank."""
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The rank's share of the samples: `data_parallel_rank`, `data_parallel_size`, `samples` (numbers of the first
    step's samples, micro-batch by micro-batch)."""
