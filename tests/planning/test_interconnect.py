"""The step on paper, against figures worked out by hand."""

import dataclasses
import json
import re

import pytest

from benchmarks import communication
from megatron_moe_lpr.model.flops import training_flops_per_token
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.communication import busiest_rank, rank_traffic
from megatron_moe_lpr.planning.interconnect import Hardware, step_times
from megatron_moe_lpr.planning.moe_traffic import placement
from megatron_moe_lpr.planning.planned_run import PlannedLayer, PlannedRun
from megatron_moe_lpr.planning.routing import Routing
from megatron_moe_lpr.planning.sizes import RunSizes
from megatron_moe_lpr.training.configuration.stages import STAGES
from tests.evaluation.tools import load_tool
from tests.planning.counted_step import SHARES, Case
from tests.planning.test_routing import evaluation

HARDWARE = Hardware(gpus_per_node=8, peak_tflops=1000.0, utilization=0.5, node_bandwidth=400.0, network_bandwidth=50.0)
SLOW_GPU = dataclasses.replace(HARDWARE, peak_tflops=0.01)
SHAPE = Case().shape
SIZES = RunSizes(STAGES["1"].trains, 16, 128, 1, 64)
EP4 = ParallelLayout(expert_model_parallel_size=4)
RUN = PlannedRun(SHAPE, EP4, SIZES)


@pytest.mark.parametrize(
    ("ranks", "stride", "rate"),
    [
        (8, 1, 400),  # one node
        (4, 2, 400),
        (16, 1, 400),  # two nodes, eight network cards each
        (8, 4, 100),  # four nodes, two cards each
        (2, 8, 50),
        (4, 16, 50),
    ],
)
def test_rings_use_the_network_cards_of_all_their_ranks(ranks, stride, rate):
    assert HARDWARE.ring_seconds(1e9, ranks, stride) == pytest.approx(1 / rate)


def test_an_exchange_waits_for_the_slower_of_node_and_network():
    assert HARDWARE.exchange_seconds(1e9, 8, 1) == pytest.approx(1 / 400)
    assert HARDWARE.exchange_seconds(15e9, 16, 1) == pytest.approx(8 / 50)
    assert HARDWARE.exchange_seconds(0.0, 1, 1) == 0.0


def test_neighbours_of_a_pipeline():
    assert HARDWARE.neighbour_seconds(1e9, 4) == pytest.approx(1 / 400)
    assert HARDWARE.neighbour_seconds(1e9, 8) == pytest.approx(1 / 50)


@pytest.mark.parametrize("inside", [False, True])
def test_every_expert_lies_on_one_rank(inside):
    placed = placement(PlannedLayer(PlannedRun(Case(experts=(9,)).shape, EP4, SIZES), 0), inside)
    assert sorted(expert for experts in placed for expert in experts) == list(range(0 if inside else 1, 9))
    assert [len(experts) for experts in placed] == [3 if inside else 2, 2, 2, 2]


def test_an_expert_group_whose_size_divides_all_experts_holds_them_as_megatron_does():
    layer = PlannedLayer(PlannedRun(Case(experts=(8,)).shape, EP4, SIZES), 0)
    assert placement(layer, original_in_ep_group=True) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_balanced_routing_waits_for_nobody_and_one_rank_sends_nothing():
    times = step_times(RUN, Routing(), HARDWARE)
    assert times.imbalance == pytest.approx(0.0, abs=1e-18)
    alone = PlannedRun(SHAPE, ParallelLayout(), dataclasses.replace(SIZES, gpus=1))
    assert busiest_rank(alone, Routing()).total == 0
    assert step_times(alone, Routing(), SLOW_GPU).bound == "compute 100%"


def test_a_micro_batch_takes_as_long_as_the_slower_of_gpu_and_host():
    """Four micro-batches of 201 launches, 4 us each; on a slow GPU the host is ahead."""
    host = 4 * 201 * 4e-6
    fast, slow = (step_times(RUN, Routing(), hardware) for hardware in (HARDWARE, SLOW_GPU))
    sent = fast.tensor + fast.expert + fast.pipeline
    assert fast.launches == pytest.approx(host - fast.compute - sent)
    assert fast.launches > 0.9 * host
    assert fast.compute + sent + fast.launches == pytest.approx(host)
    assert "launches" in fast.bound
    assert slow.compute > host
    assert slow.launches == 0.0


def test_computation_takes_its_operations():
    times = step_times(RUN, Routing(), HARDWARE)
    flops = training_flops_per_token(SHAPE, STAGES["1"].trains, 128) * 64 * 128 / 16
    assert times.compute == pytest.approx(flops / 500e12)


def test_the_busiest_rank_is_waited_for():
    """Of four EP ranks the one with expert 1, in three of four tokens; inside, expert 0 lies there too, frozen."""
    outside, inside = (step_times(RUN, Routing((SHARES,)), HARDWARE, way) for way in (False, True))
    rate, product = 500e12, 2 * 3 * 64 * 96
    average = 2 * SHARES[0] + 3 * (2 - SHARES[0])
    for times, most in ((outside, 2 * SHARES[0] + 4 * 3 * SHARES[1]), (inside, 4 * (2 * SHARES[0] + 3 * SHARES[1]))):
        assert times.imbalance == pytest.approx(2 * product * (most - average) * 64 * 128 / 16 / rate)


def test_gradients_overlap_with_one_micro_batch():
    """64 sequences on 16 ranks, of which one of four micro-batches hides what is sent."""
    slow = dataclasses.replace(HARDWARE, network_bandwidth=0.001)
    times = step_times(RUN, Routing(), slow)
    sent = busiest_rank(RUN, Routing())
    seconds = sent.data / 8e6 + sent.expert_data / 2e6
    micro_batch = (times.compute + times.launches) / 4
    assert seconds > micro_batch
    assert times.data == pytest.approx(seconds - micro_batch)


def test_the_busiest_rank_sends_at_least_what_each_rank_does():
    routing = Routing((SHARES, SHARES[::-1]))
    for inside in (False, True):
        most = busiest_rank(RUN, routing, inside)
        each = [rank_traffic(RUN, routing, 0, rank, inside) for rank in range(4)]
        assert most.expert > max(one.expert for one in each)
        assert most.expert_data == each[0].expert_data


def test_tokens_of_the_original_expert_are_sent_only_inside_the_group():
    """All of them: each rank gives away 3/4 of its tokens, and rank 0's experts answer the three others."""
    only = Routing(((1.0, 0.25, 0.25, 0.25, 0.25),))
    outside, inside = (rank_traffic(RUN, only, 0, 0, way).expert for way in (False, True))
    batches, tokens, layers = 4, 128, 2
    row = 2 * (2 * 64) + 2 * 4 + 2 * (2 * 64)
    assert outside == pytest.approx(layers * batches * tokens * (0.75 + 3 * 0.25) * (row / 2))
    assert inside - outside == pytest.approx(layers * batches * tokens * 3 * 1.0 * (row / 2))


def test_plan_prints_what_layouts_send(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps(communication.QWEN))
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation()))
    arguments = [
        "--hf",
        str(tmp_path),
        "--gpus",
        "8",
        "--num-experts",
        "5",
        "--routing",
        str(tmp_path / "evaluation.json"),
    ]
    monkeypatch.setattr("sys.argv", ["plan.py", *arguments])
    load_tool("plan").main()
    printed = capsys.readouterr().out
    assert "estimated step time (never measured)" in printed
    # 41.25%: sum() of Python 3.12 and newer rounds the other way.
    assert re.search(r"41\.[23]% of the tokens have the original expert among their top k \(25% of the tokens", printed)


def test_benchmark_prints_a_table(tmp_path, monkeypatch, capsys):
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation()))
    monkeypatch.setattr(communication, "GPUS", (8,))
    monkeypatch.setattr(communication, "MICRO_BATCHES", (4,))
    file = str(tmp_path / "evaluation.json")
    monkeypatch.setattr("sys.argv", ["communication", "--stage1", file, "--stage2", file])
    communication.main()
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len([line for line in lines if line[1].strip() == "8"]) == 8
    qwen, llama = lines[:6], lines[6:]
    (narrow,), (wide,) = ({len(line) for line in table} for table in (qwen, llama))
    assert narrow < wide == len(communication.COLUMNS) + 2
