"""Flags of Megatron's that a run does not take end in one line with the reason, wherever they are given."""

import dataclasses
import inspect
import json
from pathlib import Path

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt import fine_grained_callables
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.training.configuration.config_file import parse_training_flags, training_config
from megatron_moe_lpr.training.configuration.description import FLAGS
from megatron_moe_lpr.training.configuration.megatron_flags import REFUSED, refuse_megatron_flags

NEEDED = ["--stage", "1", "--load", "a", "--save", "s", "--train-iters", "7", "--data-path", "x"]
TAKEN = {f"--{flag.name.replace('_', '-')}" for flag in FLAGS}


def test_no_flag_of_a_run_is_refused():
    assert not REFUSED.keys() & TAKEN


def test_every_router_option_of_megatron_s_is_offered_or_has_its_reason():
    """Of the installed version: what a new one brings must be looked at."""
    fields = {field.name for kind in (TransformerConfig, OptimizerConfig) for field in dataclasses.fields(kind)}
    fields |= {field.name for field in dataclasses.fields(DistributedDataParallelConfig)}
    router = {
        f"--{name.replace('_', '-')}" for name in fields if name.startswith(("moe_router", "moe_expert_", "moe_z"))
    }
    assert not router - TAKEN - REFUSED.keys()


@pytest.mark.parametrize(
    "words",
    [
        ["--moe-router-score-function", "sigmoid"],
        ["--moe-router-score-function=sigmoid"],
        ["--moe_router_score_function", "sigmoid"],
        ["--moe-z-loss-coeff", "1e-3"],
        ["--num-layers", "32"],
        ["--no-load-optim"],
        ["--no-moe-grouped-gemm"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("needed", [NEEDED, []], ids=["whole", "alone"])
def test_a_command_line_ends_in_one_line(words, needed, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_training_flags([*needed, *words])
    error = capsys.readouterr().err
    flag = words[0].partition("=")[0].replace("_", "-")
    name = flag if flag in REFUSED else flag.replace("--no-", "--")
    assert stop.value.code == 2
    assert error == f"error: {REFUSED[name]}\n"


def test_so_do_a_file_and_a_mapping(tmp_path, capsys):
    values = {"stage": 1, "moe_aux_loss_coeff": 0.01}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(values))
    for source in (values, file):
        with pytest.raises(UserError, match=r"^--moe-aux-loss-coeff is named --load-balancing-coeff"):
            training_config(source)
    with pytest.raises(SystemExit):
        parse_training_flags(["--config", str(file)])
    assert "--moe-aux-loss-coeff is named --load-balancing-coeff" in capsys.readouterr().err


def test_the_page_names_every_option_of_the_router_that_is_refused():
    page = (Path(__file__).parents[3] / "docs" / "gpu.md").read_text()
    assert [flag for flag in REFUSED if flag.startswith("--moe-router") and f"`{flag}`" not in page] == []


def test_values_and_other_flags_pass():
    refuse_megatron_flags([*NEEDED, "--moe-token-dispatcher-type", "alltoall", "--tensorboard-dir", "optimizer", "-x"])


@pytest.mark.parametrize("flag", REFUSED)
def test_a_reason_is_one_sentence_that_begins_with_the_flag(flag):
    reason = REFUSED[flag].removeprefix(f"{flag} ")
    assert "\n" not in reason and reason.startswith(("is ", "would ", "follows ", "does ")) and len(reason) < 200


def test_the_reasons_against_graphs_and_the_combined_schedule_still_hold():
    """Should Megatron pass the tags on there, in `padding_mask`, these flags can be tried again."""
    # megatron-core 0.19 has the replay in a function of its own.
    name = "_te_cuda_graph_replay"
    replay = inspect.getsource(getattr(TransformerLayer, f"{name}_impl", getattr(TransformerLayer, name)))
    assert "layer.mlp.route(pre_mlp_layernorm_output)" in inspect.getsource(fine_grained_callables)
    assert "self._forward_mlp(*cuda_graph_output)" in replay and "padding_mask" not in replay
