"""Records every collective of a rehearsed rank instead of running it.

Below torch.distributed, the methods of `ProcessGroup` are replaced: whatever calls a collective, in whatever way, ends
there. Above it, so are the functions that exchange Python objects, which would unpickle what no other rank has sent.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_lpr.megatron.overriding import replace
from megatron_moe_lpr.rehearsal.other_ranks import as_other_rank
from megatron_moe_lpr.rehearsal.process_group_calls import METHODS, Call
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

    def __init__(self, on_wait: Callable[[], None] = lambda: None) -> None:
        """`on_wait` is called when the rank waits for the call."""
        self.on_wait = on_wait

    def wait(self, *arguments: object) -> bool:
        """Return at once."""
        self.on_wait()
        return True

    synchronize = block_current_stream = wait

    def is_completed(self) -> bool:
        """Return True."""
        return True


class Recorder:
    """The collectives of one rank, in the order of its calls."""

    def __init__(self, rank: int, rank_0_objects: list[Any] | None = None) -> None:
        """`rank_0_objects`: the Python objects that rank 0 has handed to the collectives of all ranks, in their order:
        what the other ranks get from it. None: this is rank 0."""
        self.rank, self.rank_0_objects = rank, rank_0_objects
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
            number = len(self.collectives) - 1
            return Done(lambda: self._wait(number)) if call.kind in ("send", "recv") else Done()

        return method

    def _wait(self, number: int) -> None:
        """Note that the rank waits for a send or receive now."""
        one = self.collectives[number]
        if one.awaited is None:
            self.collectives[number] = dataclasses.replace(one, awaited=len(self.collectives) - number - 1)

    def gathered(self, kind: str, value: Any, group: dist.ProcessGroup | None) -> list[Any]:
        """Record an exchange of Python objects, and return what each rank of the group has handed in: rank 0 what it
        did when it was rehearsed, the others what this rank does."""
        group = group or self._world()
        self.record(group, Call(kind))
        ranks = self._ranks_of(group)
        own = ranks.index(self.rank)
        values = [as_other_rank(value, ranks, own, other) for other in range(len(ranks))]
        if group is dist.group.WORLD:
            if self.rank_0_objects is not None and len(self.objects) < len(self.rank_0_objects):
                values[0] = self.rank_0_objects[len(self.objects)]
            self.objects.append(value)
        return values

    def _world(self) -> dist.ProcessGroup:
        world = dist.group.WORLD
        assert world is not None
        return world

    def _object_functions(self) -> dict[str, Callable[..., None]]:
        """Stand-ins for the functions of torch.distributed that exchange Python objects, by name."""

        def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
            object_list[:] = self.gathered("all_gather_object", obj, group)

        def gather_object(
            obj: Any, object_gather_list: list[Any] | None = None, dst: int | None = None, group: Any = None, **_: Any
        ) -> None:
            values = self.gathered("gather_object", obj, group)
            if object_gather_list is not None:
                object_gather_list[:] = values

        def broadcast_object_list(object_list: list[Any], *_: Any, group: Any = None, **__: Any) -> None:
            object_list[:] = self.gathered("broadcast_object", list(object_list), group)[0]

        def scatter_object_list(
            scatter_object_output_list: list[Any],
            scatter_object_input_list: list[Any] | None = None,
            *_: Any,
            group: Any = None,
            **__: Any,
        ) -> None:
            values = self.gathered("scatter_object", scatter_object_input_list, group)[0]
            scatter_object_output_list[0] = values[dist.get_rank(group)] if values else None

        functions = (all_gather_object, gather_object, broadcast_object_list, scatter_object_list)
        return {function.__name__: function for function in functions}


def _set(before: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    before.callback(setattr, owner, name, getattr(owner, name))
    replace(owner, **{name: value})


def _without_backend(new_group: Callable[..., Any]) -> Callable[..., Any]:
    """`new_group` whose groups have the backend of the world, whatever the caller names."""

    def call(*arguments: Any, **options: Any) -> Any:
        return new_group(*arguments, **options | {"backend": None, "pg_options": None})

    return call
