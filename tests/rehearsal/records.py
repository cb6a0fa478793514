"""Records of ranks, written by hand."""

import dataclasses
from collections.abc import Callable

from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.rehearsal.agreement import check_agreement
from megatron_moe_lpr.rehearsal.record import Collective, RankRecord
from megatron_moe_lpr.rehearsal.symmetry import World


def call(kind: str, *ranks: int, group: str = "tp", size: int = 64, site: str = "", **further) -> Collective:
    """A call on the group of these ranks, by default from a place named after its kind."""
    dtype = "" if kind in ("barrier", "all_gather_object") else "float32"
    site = site or f"{kind}.py:1 in {kind}"
    return Collective(kind, ranks, group, dtype, size if dtype else 0, site=site, **further)


def exchange(ranks: tuple[int, ...], sent: tuple[int, ...], received: tuple[int, ...]) -> Collective:
    """An all_to_all of fp32 elements."""
    sizes = {"sizes": sent, "received": received}
    return call("all_to_all", *ranks, group="ep", size=4 * sum(sent), site="dispatch.py:7 in dispatch", **sizes)


def without(calls: list[Collective], place: int) -> list[Collective]:
    """The calls but one."""
    return calls[:place] + calls[place + 1 :]


def records(*calls: list[Collective]) -> list[RankRecord]:
    """A record for each rank from 0."""
    return [RankRecord(rank, list(made)) for rank, made in enumerate(calls)]


def found(made: list[RankRecord], world: World | None = None) -> list[str]:
    """The findings as lines."""
    return [str(finding) for finding in check_agreement(made, world)]


def world(size: int, **layout: int) -> World:
    """A world; layout by short names: tp=2, pp=2, ep=2, etp=2."""
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
    }
    return World(ParallelLayout(**{names[name]: value for name, value in layout.items()}), size)


def whole_world(size: int, program: Callable[[int], list[Collective]]) -> list[RankRecord]:
    """The records of all ranks, each of which runs the same program."""
    return [RankRecord(rank, program(rank)) for rank in range(size)]


def in_phase(phase: str, calls: list[Collective]) -> list[Collective]:
    """The same calls in another phase."""
    return [dataclasses.replace(made, phase=phase) for made in calls]
