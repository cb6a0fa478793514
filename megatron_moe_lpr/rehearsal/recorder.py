"""Records every collective of a rehearsed rank instead of running it.

Below torch.distributed, the methods of `ProcessGroup` are replaced: whatever calls a collective, in whatever way, ends
there. Above it, so are the functions that exchange Python objects, which would unpickle what no other rank has sent.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_lpr.rehearsal.checkpoints import as_other_rank
from megatron_moe_lpr.rehearsal.record import Collective, Phase
from megatron_moe_lpr.rehearsal.storages import place

NAMES = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "DATA_PARALLEL_GROUP": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp_cp",
    "DATA_PARALLEL_GROUP_GLOO": "dp_gloo",
    "DATA_PARALLEL_GROUP_WITH_CP_GLOO": "dp_cp_gloo",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "MODEL_PARALLEL_GROUP": "tp_pp",
    "EMBEDDING_GROUP": "embd",
    "POSITION_EMBEDDING_GROUP": "pos_embd",
    "TENSOR_AND_DATA_PARALLEL_GROUP": "tp_dp",
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tp_dp_cp",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp_cp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expt_tp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "tp_ep",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "tp_ep_pp",
    "EXPERT_DATA_PARALLEL_GROUP": "expt_dp",
    "EXPERT_DATA_PARALLEL_GROUP_GLOO": "expt_dp_gloo",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "intra_dist_opt",
    "default_pg": "world",
}
"""Short names, as ProcessGroupCollection has them, of the descriptions that Megatron gives its groups
(parallel_state.py `initialize_model_parallel`). Other groups keep their description."""


class Done:
    """Stand-in for torch.distributed.Work: a recorded call is finished when it returns."""

    def wait(self, *arguments: object) -> bool:
        """Return at once."""
        return True

    synchronize = block_current_stream = wait

    def is_completed(self) -> bool:
        """Return True."""
        return True


@dataclasses.dataclass(frozen=True)
class Call:
    """A collective as a method of `ProcessGroup` was asked for it."""

    kind: str
    tensors: Sequence[torch.Tensor] = ()
    """What the rank hands in, or is to receive."""
    sizes: Sequence[int] | None = None
    received: Sequence[int] | None = None
    peer: int | None = None
    """Rank in the group."""
    fills: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    """Tensors to fill, each with what this rank itself has handed in."""


class Recorder:
    """The collectives of one rank, in the order of its calls."""

    def __init__(self, rank: int, of_rank_0: "list[Any] | None" = None) -> None:
        """`of_rank_0`: the Python objects that rank 0 has handed to the collectives of all ranks, in their order: what
        the other ranks get from it. None: this is rank 0, or it was not rehearsed."""
        self.rank, self.of_rank_0 = rank, of_rank_0
        self.phase: Phase = "start"
        self.collectives: list[Collective] = []
        self.objects: list[Any] = []
        """Python objects that this rank has handed to the collectives of all ranks."""
        self._ranks: dict[dist.ProcessGroup, tuple[int, ...]] = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, record every collective of this process, and run none."""
        with contextlib.ExitStack() as before:
            for name, call in METHODS.items():
                if name in vars(dist.ProcessGroup):
                    _set(before, dist.ProcessGroup, name, self._method(call))
            for name, function in self._object_functions().items():
                for module in (dist, dist.distributed_c10d):
                    _set(before, module, name, function)
            _set(before, dist, "new_group", _without_backend(dist.new_group))
            yield

    def record(self, group: dist.ProcessGroup, call: Call) -> None:
        """Add a call."""
        ranks = self._ranks_of(group)
        first = next(iter(call.tensors), None)
        self.collectives.append(
            Collective(
                kind=call.kind,
                ranks=ranks,
                group=NAMES.get(group.group_desc, group.group_desc),
                dtype="" if first is None else str(first.dtype).removeprefix("torch."),
                bytes=sum(tensor.nbytes for tensor in call.tensors),
                sizes=None if call.sizes is None else tuple(call.sizes),
                received=None if call.received is None else tuple(call.received),
                peer=None if call.peer is None else ranks[call.peer],
                phase=self.phase,
                site=place(),
            )
        )

    def _ranks_of(self, group: dist.ProcessGroup) -> tuple[int, ...]:
        if group not in self._ranks:
            self._ranks[group] = tuple(dist.get_process_group_ranks(group))
        return self._ranks[group]

    def _method(self, describe: Callable[..., Call]) -> Callable[..., Done]:
        def method(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Done:
            call = describe(group, *arguments, **options)
            self.record(group, call)
            with torch.no_grad():
                for target, source in call.fills:
                    if target.shape == source.shape:
                        target.copy_(source)
            return Done()

        return method

    def _object_functions(self) -> dict[str, Callable[..., None]]:
        def gathered(value: Any, group: Any) -> list[Any]:
            group = group or dist.group.WORLD
            ranks = self._ranks_of(group)
            own = ranks.index(self.rank)
            values = [as_other_rank(value, own, other) for other in range(len(ranks))]
            if group is dist.group.WORLD:
                if self.of_rank_0 is not None and len(self.objects) < len(self.of_rank_0):
                    values[0] = self.of_rank_0[len(self.objects)]
                self.objects.append(value)
            return values

        def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
            self.record(group or dist.group.WORLD, Call("all_gather_object"))
            object_list[:] = gathered(obj, group)

        def gather_object(
            obj: Any, object_gather_list: list[Any] | None = None, dst: int | None = None, group: Any = None, **_: Any
        ) -> None:
            self.record(group or dist.group.WORLD, Call("gather_object"))
            values = gathered(obj, group)
            if object_gather_list is not None:
                object_gather_list[:] = values

        def broadcast_object_list(object_list: list[Any], *_: Any, group: Any = None, **__: Any) -> None:
            self.record(group or dist.group.WORLD, Call("broadcast_object"))
            object_list[:] = gathered(list(object_list), group)[0]

        def scatter_object_list(
            scatter_object_output_list: list[Any],
            scatter_object_input_list: list[Any] | None = None,
            *_: Any,
            group: Any = None,
            **__: Any,
        ) -> None:
            self.record(group or dist.group.WORLD, Call("scatter_object"))
            values = gathered(scatter_object_input_list, group)[0]
            scatter_object_output_list[0] = values[dist.get_rank(group)] if values else None

        functions = (all_gather_object, gather_object, broadcast_object_list, scatter_object_list)
        return {function.__name__: function for function in functions}


def _set(before: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    before.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _without_backend(new_group: Callable[..., Any]) -> Callable[..., Any]:
    """`new_group` whose groups have the backend of the world, whatever the caller names."""

    def call(*arguments: Any, **options: Any) -> Any:
        return new_group(*arguments, **options | {"backend": None, "pg_options": None})

    return call


def _splits(tensor: torch.Tensor, splits: Sequence[int], size: int) -> list[int]:
    """Elements of each rank's part, from its rows; without numbers of rows the parts are equal."""
    row = tensor[:1].numel() if len(tensor) else tensor.numel()
    rows = [int(count) for count in splits] if len(splits) else [len(tensor) // size] * size
    if len(tensor) == 0:
        return [0] * size
    return [count * row for count in rows]


def _all_reduce(group: Any, tensors: list[torch.Tensor], *_: Any, **__: Any) -> Call:
    return Call("all_reduce", tensors)


def _all_gather(group: Any, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], *_: Any, **__: Any) -> Call:
    pairs = [(target, source) for targets, source in zip(outputs, inputs, strict=True) for target in targets]
    return Call("all_gather", inputs, fills=pairs)


def _all_gather_one(group: Any, output: torch.Tensor, source: torch.Tensor, *_: Any, **__: Any) -> Call:
    return _all_gather_many(group, [output], [source])


def _all_gather_many(group: Any, outputs: list[torch.Tensor], inputs: list[torch.Tensor], *_: Any, **__: Any) -> Call:
    pairs = [
        (part, source.reshape(-1))
        for output, source in zip(outputs, inputs, strict=True)
        for part in output.reshape(group.size(), -1)
    ]
    return Call("all_gather", inputs, fills=pairs)


def _reduce_scatter(
    group: Any, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], *_: Any, **__: Any
) -> Call:
    own = [(output, parts[group.rank()]) for output, parts in zip(outputs, inputs, strict=True)]
    return Call("reduce_scatter", [part for parts in inputs for part in parts], fills=own)


def _reduce_scatter_one(group: Any, output: torch.Tensor, source: torch.Tensor, *_: Any, **__: Any) -> Call:
    return _reduce_scatter_many(group, [output], [source])


def _reduce_scatter_many(
    group: Any, outputs: list[torch.Tensor], inputs: list[torch.Tensor], *_: Any, **__: Any
) -> Call:
    own = [
        (output.reshape(-1), source.reshape(group.size(), -1)[group.rank()])
        for output, source in zip(outputs, inputs, strict=True)
        if output.data_ptr() != source.reshape(group.size(), -1)[group.rank()].data_ptr()
    ]
    return Call("reduce_scatter", inputs, fills=own)


def _all_to_all_one(
    group: Any,
    output: torch.Tensor,
    source: torch.Tensor,
    output_splits: Sequence[int] = (),
    input_splits: Sequence[int] = (),
    *_: Any,
    **__: Any,
) -> Call:
    size = group.size()
    sent, received = _splits(source, input_splits, size), _splits(output, output_splits, size)
    return Call("all_to_all", [source], sent, received, fills=[(output, source)])


def _all_to_all(group: Any, outputs: list[torch.Tensor], inputs: list[torch.Tensor], *_: Any, **__: Any) -> Call:
    sizes = ([tensor.numel() for tensor in tensors] for tensors in (inputs, outputs))
    return Call("all_to_all", inputs, *sizes, fills=list(zip(outputs, inputs, strict=True)))


def _broadcast(group: Any, tensors: list[torch.Tensor], options: Any, *_: Any, **__: Any) -> Call:
    return Call("broadcast", tensors, peer=options.rootRank)


def _reduce(group: Any, tensors: list[torch.Tensor], options: Any, *_: Any, **__: Any) -> Call:
    return Call("reduce", tensors, peer=options.rootRank)


def _gather(group: Any, outputs: list, inputs: list[torch.Tensor], options: Any, *_: Any, **__: Any) -> Call:
    pairs = [(target, source) for targets, source in zip(outputs, inputs, strict=False) for target in targets]
    return Call("gather", inputs, peer=options.rootRank, fills=pairs)


def _scatter(group: Any, outputs: list[torch.Tensor], inputs: list, options: Any, *_: Any, **__: Any) -> Call:
    return Call("scatter", outputs, peer=options.rootRank)


def _send(group: Any, tensors: list[torch.Tensor], peer: int, *_: Any, **__: Any) -> Call:
    return Call("send", tensors, peer=peer)


def _receive(group: Any, tensors: list[torch.Tensor], peer: int, *_: Any, **__: Any) -> Call:
    return Call("recv", tensors, peer=peer)


def _barrier(group: Any, *_: Any, **__: Any) -> Call:
    return Call("barrier")


METHODS: dict[str, Callable[..., Call]] = {
    "allreduce": _all_reduce,
    "allreduce_coalesced": _all_reduce,
    "allgather": _all_gather,
    "allgather_coalesced": _all_gather,
    "_allgather_base": _all_gather_one,
    "all_gather_single": _all_gather_one,
    "allgather_into_tensor_coalesced": _all_gather_many,
    "all_gather_single_coalesced": _all_gather_many,
    "reduce_scatter": _reduce_scatter,
    "_reduce_scatter_base": _reduce_scatter_one,
    "reduce_scatter_single": _reduce_scatter_one,
    "reduce_scatter_tensor_coalesced": _reduce_scatter_many,
    "reduce_scatter_single_coalesced": _reduce_scatter_many,
    "alltoall_base": _all_to_all_one,
    "all_to_all_single": _all_to_all_one,
    "alltoall": _all_to_all,
    "broadcast": _broadcast,
    "reduce": _reduce,
    "gather": _gather,
    "scatter": _scatter,
    "send": _send,
    "recv": _receive,
    "barrier": _barrier,
    "monitored_barrier": _barrier,
}
"""By method of `ProcessGroup`: what the call is. Versions of torch have some of them under other names."""
