"""The planner's table of launches against a count on the emulated device."""

import dataclasses
from collections import Counter
from unittest.mock import patch

import pytest
from megatron.core import parallel_state

from megatron_moe_lpr.engine.micro_batches import run_schedule
from megatron_moe_lpr.engine.routing import count_routing
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.launches import launches_per_micro_batch
from megatron_moe_lpr.planning.planned_run import PlannedRun
from megatron_moe_lpr.planning.sizes import RunSizes
from megatron_moe_lpr.platform import select_platform
from megatron_moe_lpr.training.configuration.stages import STAGES
from tests.gpu import device, memory
from tests.gpu.launches import Launches
from tests.gpu.memory import LANGUAGE_GROUP, Case, Model
from tests.gpu.ranks import run
from tests.gpu.test_memory import EP, PP, TP

if not device.EMULATED:
    pytest.skip("counts calls of the emulation", allow_module_level=True)

MOE = Model("qwen2", 128, 256, 4, 2, 32, 512, 2, (5,), 320)
MORE = dataclasses.replace(MOE, num_hidden_layers=3, experts=(5, 1, 3))
DENSE = dataclasses.replace(MOE, experts=(1,))
CASES = {
    "stage 1": (MORE, Case()),
    "stage 2": (MOE, Case(stage="2")),
    "stage full": (MORE, Case(stage="full")),
    "stage full, dense": (DENSE, Case(stage="full")),
    "stage full, dense, TP2": (DENSE, Case(stage="full", layout=TP)),
    "recompute full": (MORE, Case(recompute="full")),
    "recompute moe, EP2": (MOE, Case(recompute="moe", layout=EP)),
    "recompute moe, TP2": (MOE, Case(recompute="moe", layout=TP)),
    "recompute mlp, TP2": (MORE, Case(recompute="mlp", layout=TP)),
    "PP2": (MOE, Case(layout=PP)),
    "fp8 delayed": (MORE, Case(number="delayed")),
    "fp8 tensorwise, recompute moe": (MOE, Case(number="tensorwise", recompute="moe")),
    "fp8 delayed, recompute full": (MORE, Case(number="delayed", recompute="full")),
    "fp8 tensorwise": (MOE, Case(number="tensorwise", stage="2")),
}
FP8_DIFFERENCE = 1
"""Launches a layer by which the recipes differ."""


def counted_and_planned(model: Model, case: Case) -> tuple[Counter, int]:
    """On every rank: launches of one more micro-batch in a step, by operation, and the planner's number."""
    layout = ParallelLayout(**dict(case.layout))
    platform = select_platform("cuda", layout.tensor_model_parallel_size)
    initialize_parallel(platform, layout)
    with patch.object(memory, "route_by_position", lambda *_: None):  # would add operations of its own
        chunks, config = memory._build(model, case, layout, platform)
    count_routing(chunks, False)  # as in all steps but those that log
    batch = memory._batch(model, platform.device)

    def count(micro_batches: int) -> Counter:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        log, found = Launches(), Counter()
        with log.active():
            run_schedule(chunks, config, [batch] * micro_batches, LANGUAGE_GROUP.to(platform.device))
        for operation in log.operations:
            found[operation.name] += operation.launches
        return found

    _, before, after = count(1), count(2), count(3)  # the first one also makes what stays
    after.subtract(before)
    recipe = {} if case.number in ("fp32", "bf16") else {"fp8_recipe": case.number}
    precision = "fp8" if recipe else case.number
    sizes = RunSizes(STAGES[case.stage].trains, case.ranks, model.seq_length, precision=precision, **recipe)
    planned = PlannedRun(model.shape, layout, sizes, case.recompute)
    return after, launches_per_micro_batch(planned, parallel_state.get_pipeline_model_parallel_rank())


@pytest.mark.parametrize("name", CASES)
def test_planned_and_counted(name):
    """To update planning/launches.py: `-s` prints what was counted, operation by operation."""
    model, case = CASES[name]
    for counted, planned in run(case.ranks, counted_and_planned, model, case):
        operations = ", ".join(f"{operation} {count}" for operation, count in counted.most_common() if count)
        found = sum(counted.values())
        print(f"\n{name}: counted {found}, planned {planned}: {operations}")
        assert abs(found - planned) <= (
            FP8_DIFFERENCE * len(model.shape.experts_per_layer) if case.number != "bf16" else 0
        )
