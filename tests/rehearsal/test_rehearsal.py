"""The command, once for a world of 16: what is recorded against the plan, which is checked against real ranks."""

import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_moe_lpr.command_line import read_flags
from megatron_moe_lpr.commands.rehearse import Flags
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.architecture import read_architecture
from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.communication import rank_traffic
from megatron_moe_lpr.planning.planned_run import PlannedRun
from megatron_moe_lpr.planning.routing import Routing
from megatron_moe_lpr.planning.sizes import RunSizes
from megatron_moe_lpr.planning.traffic import LOCAL_GPU
from megatron_moe_lpr.rehearsal.record import PHASES
from megatron_moe_lpr.training.configuration.stages import STAGES

MODEL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float32",
    "hidden_act": "silu",
}  # fmt: skip
WORLD, SEQUENCE, EXPERTS, MICRO_BATCHES = 16, 160, 5, 4
LAYOUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}
RUN = LAYOUT | {
    "stage": "1", "load": "nowhere", "save": "nothing", "data_path": ["no/train-el"],
    "valid_data_path": ["no/valid-en"], "original_languages": ["en"], "train_iters": 1000, "lr_warmup_iters": 10,
    "global_batch_size": 4 * 16, "seq_length": SEQUENCE, "bf16": True,
}  # fmt: skip
KINDS = {"tp": "tensor", "ep": "expert", "expt_dp": "expert_data", "dp_cp": "data", "pp": "pipeline"}
"""The plan's kinds of what travels over a group; counts of rows and single numbers are others."""


def run_command(directory: Path, *words: str) -> subprocess.CompletedProcess:
    (directory / "config.json").write_text(json.dumps(MODEL))
    (directory / "run.json").write_text(json.dumps(RUN))
    command = [sys.executable, "-m", "megatron_moe_lpr.cli", "rehearse", "--config", "run.json"]
    command += ["--hf", "config.json", "--num-experts", str(EXPERTS), "--world-size", str(WORLD), *words]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Output and JSON of a rehearsal of a sample of ranks."""
    directory = tmp_path_factory.mktemp("rehearsal")
    done = run_command(directory, "--ranks", "0,1,7,8", "--output", "record.json")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in directory.iterdir()} == {"config.json", "run.json", "record.json"}
    return done.stdout, json.loads((directory / "record.json").read_text())


def planned_run() -> PlannedRun:
    shape = ModelShape(read_architecture(MODEL, "config"), (EXPERTS,) * 2, 2)
    layout = ParallelLayout(**LAYOUT)
    batch = MICRO_BATCHES * layout.data_parallel_size(WORLD)
    sizes = RunSizes(STAGES["1"].trains, WORLD, SEQUENCE, 1, batch, transformer_engine=False)
    return PlannedRun(shape, layout, sizes)


def test_every_phase_is_recorded_and_named_as_simulated(rehearsed):
    output, record = rehearsed
    assert [one["rank"] for one in record["ranks"]] == [0, 1, 7, 8]
    for rank in record["ranks"]:
        phases = [one["phase"] for one in rank["collectives"]]
        assert list(dict.fromkeys(phases)) == list(PHASES)
        assert all(one["site"] for one in rank["collectives"])
    assert "simulated: 4 of the 16 micro-batches" in output and "without weights" in output
    assert "Collectives of rank 0 (simulated" in output and "Collectives of rank 8 (simulated" in output


def test_groups_are_megatrons(rehearsed):
    """By tp-cp-ep-dp-pp: TP of neighbours, PP half the world apart."""
    groups = {(one["group"], tuple(one["ranks"])) for one in rehearsed[1]["ranks"][2]["collectives"]}
    assert {("tp", (6, 7)), ("pp", (7, 15)), ("dp_cp", (1, 3, 5, 7)), ("world", tuple(range(WORLD)))} <= groups
    assert {("ep", (6, 7)), ("expt_dp", (1, 3, 5, 7))} <= groups


def test_a_step_sends_what_is_planned(rehearsed):
    for rank in rehearsed[1]["ranks"]:
        sent: Counter[str] = Counter()
        for one in rank["collectives"]:
            kind, ranks = KINDS.get(one["group"]), len(one["ranks"])
            if one["phase"] != "step" or kind is None or one["dtype"] in ("int64", "int32"):
                continue
            sent[kind] += sent_bytes(one, ranks, one["ranks"].index(rank["rank"]))
        planned = rank_traffic(
            planned_run(),
            Routing(),
            rank["coordinates"]["pp"],
            rank["coordinates"]["ep"],
            behaviour=dataclasses.replace(LOCAL_GPU, gradient_of_embedding=True),
        )
        expected = {kind: getattr(planned, kind) for kind in KINDS.values()}
        assert dict(sent) == pytest.approx(expected, rel=0.005), f"rank {rank['rank']}"


def sent_bytes(one: dict, ranks: int, own: int) -> float:
    """Of a call, as in tests/planning/traffic.py."""
    size = one["bytes"]
    if one["kind"] == "all_to_all":
        return size * (1 - one["sizes"][own] / max(sum(one["sizes"]), 1))
    shares = {
        "all_reduce": 2 * (ranks - 1) / ranks,
        "all_gather": ranks - 1,
        "reduce_scatter": (ranks - 1) / ranks,
        "send": 1,
    }
    return size * shares.get(one["kind"], 0)


def test_memory_is_as_planned(rehearsed):
    for rank in rehearsed[1]["ranks"]:
        for part in ("parameters", "gradients", "optimizer", "activations"):
            assert rank["memory"][part] == pytest.approx(rank["planned"][part], rel=0.05), f"{rank['rank']} {part}"


def test_all_to_alls_of_a_group_fit_together(rehearsed):
    """Ranks 0 and 1 share the experts: what one sends the other receives."""
    first, second = (
        [one for one in rank["collectives"] if one["kind"] == "all_to_all"] for rank in rehearsed[1]["ranks"][:2]
    )
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one["sizes"][1] == other["received"][0] and one["received"][1] == other["sizes"][0]


def test_files_of_a_save(rehearsed):
    """Each rank has its own names; of the trained weights a rank writes its part of the states at least."""
    files = [name for rank in rehearsed[1]["ranks"] for name, _ in rank["files"]]
    assert len(files) == len(set(files)) > 4
    for rank in rehearsed[1]["ranks"]:
        assert sum(size for _, size in rank["files"]) >= rank["memory"]["optimizer"]


def test_data_parallel_ranks_read_their_samples(rehearsed):
    """Of each 4 samples, one for each of the 4 data-parallel ranks, a rank reads the one of its number."""
    for rank in rehearsed[1]["ranks"]:
        first = rank["coordinates"]["dp"]
        assert rank["data"]["samples"] == [[4 * number + first] for number in range(MICRO_BATCHES)]
    assert {rank["coordinates"]["dp"] for rank in rehearsed[1]["ranks"]} == {0, 3}


def test_sends_and_receives_are_waited_for(rehearsed):
    for rank in rehearsed[1]["ranks"]:
        exchanges = [one for one in rank["collectives"] if one["kind"] in ("send", "recv")]
        assert exchanges and all(one["awaited"] is not None and one["awaited"] <= 3 for one in exchanges)
        assert {one["peer"] for one in exchanges} == {(rank["rank"] + WORLD // 2) % WORLD}


def test_ranks_agree(rehearsed):
    output, _ = rehearsed
    assert "simulated: all 16 ranks agree, 4 of them rehearsed" in output


def test_values_are_computed_where_asked(tmp_path):
    """The loss of random weights is about that of drawing a token by chance."""
    one = dict.fromkeys(LAYOUT, 1)
    words = [f"--{name.replace('_', '-')}={size}" for name, size in one.items()]
    done = run_command(
        tmp_path, "--world-size=1", *words, "--seq-length=32", "--global-batch-size=2", "--compute-values",
        "--output", "record.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (rank,) = json.loads((tmp_path / "record.json").read_text())["ranks"]
    assert rank["loss"] == pytest.approx(math.log(MODEL["vocab_size"]), rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--world-size=15"], "15 ranks cannot hold TP 2 x PP 2 = 4 ranks per model copy"),
        (["--world-size=12", "--expert-model-parallel-size=4"], "12 ranks cannot hold expert TP 1 x EP 4 x PP 2"),
        (["--world-size=48"], "--global-batch-size 64 is not a multiple of --micro-batch-size 1 x 12 data-parallel"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_as_by_training(changes, message):
    from megatron_moe_lpr.command_line import flag_words
    from megatron_moe_lpr.rehearsal.simulated_run import simulate

    flags = read_flags(Flags, [*flag_words(RUN, "run"), *changes])
    with pytest.raises(UserError, match=message):
        simulate(flags.run, flags.world_size)
