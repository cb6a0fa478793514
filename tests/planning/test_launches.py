"""Launches of a micro-batch by hand, and what a plan makes of them (the table: tests/gpu/test_planned_launches.py)."""

import dataclasses
import json

import pytest

from megatron_moe_lpr.commands import plan
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.launches import LAUNCH_SECONDS, launches_per_micro_batch, launching_seconds
from megatron_moe_lpr.planning.planned_run import PlannedRun
from megatron_moe_lpr.planning.search import Machine, evaluate, launching_share, without_launch_bound
from megatron_moe_lpr.planning.sizes import RunSizes
from megatron_moe_lpr.training.configuration.stages import STAGES
from tests.planning.counted_step import Case
from tests.planning.test_search import CONFIG
from tests.planning.test_search import shape as large

ATTENTION, DENSE_FFN, MOE = 11 + 13, 4 + 5, 1 + 2 + 14 + 19
EP2 = ParallelLayout(expert_model_parallel_size=2)
PP2 = ParallelLayout(pipeline_model_parallel_size=2)
TP2 = ParallelLayout(tensor_model_parallel_size=2)


def run(stage="1", experts=(5, 5), layout=None, recompute="none", **sizes) -> PlannedRun:
    fields = {"gpus": 8, "seq_length": 128, "global_batch_size": 64} | sizes
    return PlannedRun(
        Case(experts=experts).shape, layout or ParallelLayout(), RunSizes(STAGES[stage].trains, **fields), recompute
    )


@pytest.mark.parametrize(
    ("planned", "ranks"),
    [
        (run("2", (1, 1)), [2 * (ATTENTION + DENSE_FFN) + 37]),
        (run("2"), [2 * (ATTENTION + MOE + 4 * 4) + 53]),
        (run("1"), [2 * (ATTENTION + MOE + 4 * 6) + 53]),
        (run("1", layout=EP2), [2 * (ATTENTION + MOE + 2 * 6 + 8) + 53]),
        (run("1", layout=TP2), [2 * (ATTENTION + MOE + 4 * 6 - 1 + 2 + 1) + 53 + 10]),
        (run("1", layout=PP2), [ATTENTION + MOE + 4 * 6 + 21, ATTENTION + MOE + 4 * 6 + 52]),
        (run("1", recompute="moe"), [2 * (ATTENTION + MOE + 14 + 4 * 8) + 53]),
        (run("1", recompute="full"), [2 * (ATTENTION + 11 + MOE + 1 + 14 + 4 * 8) + 53]),
        (run("1", recompute="mlp"), [2 * (ATTENTION + MOE + 4 * 6) + 53]),
        # In each layer gradients of four matrices, two norms and a bias; final norm, embedding and output matrix.
        (run("full", (1, 1)), [2 * (ATTENTION + DENSE_FFN + 7) + 37 + 5]),
        (run("full", (1, 1), layout=TP2), [2 * (ATTENTION - 1 + DENSE_FFN + 7) + 37 + 10 + 5 + 2]),
        (run("full", (1, 1), precision="fp8"), [2 * (ATTENTION + DENSE_FFN + 7 + 6) + 37 + 5]),
        (run("full", (1, 3)), [2 * (ATTENTION + 7) + DENSE_FFN + MOE + 2 * 6 + 53 + 5]),
        (run("1", precision="fp8"), [2 * (ATTENTION + MOE + 4 * 6 + 3 + 15) + 53]),
        (
            run("1", precision="fp8", fp8_recipe="tensorwise", recompute="moe"),
            [2 * (ATTENTION + MOE + 14 + 4 * 8 + 3 + 15 + 7) + 53],
        ),
        (run("1", precision="fp8", recompute="moe"), [2 * (ATTENTION + MOE + 14 + 4 * 8 + 3 + 15 + 7 + 36) + 53]),
        (run("1", (1, 1), precision="fp8", recompute="full"), [2 * (ATTENTION + 11 + DENSE_FFN + 4 + 6 + 2 + 46) + 37]),
    ],
)
def test_launches_of_each_pipeline_rank(planned, ranks):
    assert [launches_per_micro_batch(planned, rank) for rank in planned.pipeline_ranks] == ranks
    # 64 sequences, one a micro-batch, over the data-parallel ranks.
    batches = 64 // planned.layout.data_parallel_size(8)
    assert launching_seconds(planned) == pytest.approx(max(ranks) * batches * LAUNCH_SECONDS)


def test_larger_micro_batches_launch_less():
    one, eight = (launching_seconds(run(micro_batch_size=size)) for size in (1, 8))
    assert one == pytest.approx(8 * eight)


SMALL = PlannedRun(large(), ParallelLayout(), RunSizes(STAGES["2"].trains, 8, 128, 1))
MACHINE = Machine(8, 8, 80.0)


def test_a_plan_takes_the_slower_of_gpu_and_host():
    """128 tokens a micro-batch are too few: the launches decide."""
    slow = evaluate(SMALL, MACHINE)
    assert launching_share(SMALL, MACHINE) > 1
    assert slow.cost == pytest.approx(launching_share(SMALL, MACHINE))
    assert any("launches" in reason for reason in slow.reasons)
    enough = dataclasses.replace(SMALL, sizes=dataclasses.replace(SMALL.sizes, micro_batch_size=64))
    assert launching_share(enough, MACHINE) == pytest.approx(launching_share(SMALL, MACHINE) / 64)
    assert evaluate(enough, MACHINE).cost == 1.0


def test_the_smallest_micro_batch_that_the_host_keeps_up_with():
    share = launching_share(SMALL, MACHINE)
    found = without_launch_bound(SMALL, MACHINE)
    assert found / 2 < share <= found
    assert (
        without_launch_bound(
            dataclasses.replace(SMALL, sizes=dataclasses.replace(SMALL.sizes, micro_batch_size=64)), MACHINE
        )
        is None
    )
    # Only as large as memory and the global batch allow.
    assert without_launch_bound(SMALL, dataclasses.replace(MACHINE, gpu_memory=1.0)) is None
    few = dataclasses.replace(SMALL, sizes=dataclasses.replace(SMALL.sizes, global_batch_size=16))
    assert without_launch_bound(few, MACHINE) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--seq-length", "128"), "The host sets the pace: pass --micro-batch-size"),
        (("--seq-length", "128", "--global-batch-size", "8"), "no larger --micro-batch-size fits"),
        (("--seq-length", "4096", "--micro-batch-size", "4"), "launches"),
    ],
)
def test_plan_says_what_helps(flags, words, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    plan.main(["--hf", str(tmp_path), "--gpus", "8", "--stage", "2", *flags])
    printed = " ".join(capsys.readouterr().out.split())
    assert words in printed
    assert ("The host sets the pace" in printed) == (flags[1] == "128")
