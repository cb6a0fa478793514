"""A plan refuses what the import or the training run that it is for would refuse, in the same words."""

from pathlib import Path

import pytest

from megatron_moe_lpr.commands import plan
from megatron_moe_lpr.conversion.import_options import ImportOptions
from megatron_moe_lpr.conversion.tensor_sources import find_tensor_sources
from megatron_moe_lpr.engine.state_options import OptimizerStateOptions
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.training.setup import prepare
from tests.conversion.helpers import run
from tests.conversion.tiny_models import save_model
from tests.training.runs import LANGUAGES, make_data, training_config

IMPORTS = [
    ("qwen3_moe", {}, "add-experts"),
    ("qwen3_moe", {"add_experts": "2", "num_experts": 4}, "--num-experts 4: "),
    ("qwen3_moe", {"add_experts": "2", "top_k": 2}, "--top-k 2: "),
    ("qwen3_moe", {"add_experts": "2", "moe_layer_freq": "2"}, "--moe-layer-freq: "),
    ("qwen3_moe", {"add_experts": "2", "experts_per_layer": "9,9,9,9"}, "--experts-per-layer: "),
    ("qwen3_moe", {"add_experts": "2", "num_experts": 8, "top_k": 3}, None),
    ("qwen3_moe", {"add_experts": "2,2"}, "numbers of 0 or more for 4 layers"),
    ("qwen3_moe", {"add_experts": "0"}, "not all 0"),
    ("qwen3_moe", {"add_experts": "1017"}, "a layer has 1 to 1,024 experts"),
    ("qwen3_moe", {"add_experts": "6", "expert_model_parallel_size": 4}, "must divide the 8 experts of the base model"),
    ("qwen2", {"add_experts": "2"}, "is for a base model that is a mixture"),
    ("qwen2", {"num_experts": 5, "expert_model_parallel_size": 8}, "does not divide 4 new experts"),
    ("qwen2", {"num_experts": 3, "top_k": 4}, "--top-k 4: must lie between 1 and the number of experts, 3"),
    ("qwen2", {"num_experts": 2000}, "--num-experts 2000"),
    ("qwen2", {"moe_layer_freq": "[1]*4"}, "names 4 layers, and the model has 3"),
    ("qwen2", {"experts_per_layer": "3,3,3", "moe_layer_freq": "2"}, "--moe-layer-freq and --experts-per-layer"),
    ("qwen2", {"experts_per_layer": "3,3"}, "--experts-per-layer"),
    ("qwen2", {"experts_per_layer": "5,1,3", "top_k": 2}, None),
]
BF16 = {"fp32": False, "bf16": True}
GATHER = {"precision": "fp8", "fp8_recipe": "tensorwise", "fp8_param_gather": True}
TRAINED_SO = {**BF16, "fp8_format": "hybrid", "fp8_recipe": "tensorwise", "fp8_param_gather": True}
HOST = {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True}
RUNS = [
    ("mixture", GATHER, TRAINED_SO, "would round the frozen experts"),
    ("upcycled", {**GATHER, "stage": "2"}, {**TRAINED_SO, "stage": "2"}, "stage 2 keeps the new experts frozen"),
    ("upcycled", {**GATHER, "fp8_recipe": "delayed"}, {**TRAINED_SO, "fp8_recipe": "delayed"}, "is not supported with"),
    ("upcycled", {**GATHER, "states": OptimizerStateOptions(**HOST)}, {**TRAINED_SO, **HOST}, "the host has no FP8"),
    (
        "upcycled",
        {**GATHER, "use_distributed_optimizer": False},
        {**TRAINED_SO, "use_distributed_optimizer": False},
        "--fp8-param-gather needs --use-distributed-optimizer",
    ),
    ("upcycled", {"seq_length": 512}, {"seq_length": 512}, "--seq-length 512: the model has only 256 positions"),
    (
        "upcycled",
        {"precision": "fp8", "seq_length": 20},
        {**BF16, "fp8_format": "hybrid", "seq_length": 20},
        "--micro-batch-size x --seq-length of a rank is 40",
    ),
    ("upcycled", {"stage": "blocks"}, {"stage": "blocks"}, "trains inserted blocks and the checkpoint has none"),
    ("dense", {}, {}, "--stage 1 needs experts and the checkpoint is dense"),
    ("mixture", {"tensor_model_parallel_size": 8}, {"tensor_model_parallel_size": 8}, "4 attention heads"),
    ("mixture", {"expert_model_parallel_size": 4}, {"expert_model_parallel_size": 4}, "must divide the 8 experts"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("agreement")
    for name in ("qwen2", "qwen3_moe"):
        for file in save_model(name, root / name).glob("tokenizer*"):
            file.unlink()
    for name, source, *flags in (
        ("mixture", "qwen3_moe", "--add-experts", 2),
        ("upcycled", "qwen2", "--num-experts", 3),
        ("dense", "qwen2", "--num-experts", 1),
    ):
        run("import", "--hf", root / source, "--save", root / name, *flags)
    make_data(root)
    return root


def refusal(act) -> str | None:
    """What the user is told; None: nothing is refused."""
    try:
        act()
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("model", "flags", "words"), IMPORTS, ids=str)
def test_plan_and_import(model, flags, words, inputs):
    planned = refusal(lambda: plan.find(plan.Flags(gpus=8, hf=str(inputs / model), seq_length=64, **flags)))
    imported = refusal(lambda: find_tensor_sources(ImportOptions(inputs / model, **flags)))
    if words is None:
        assert planned is imported is None
    else:
        assert planned and words in planned and imported and words in imported


@pytest.mark.parametrize(("model", "flags", "changes", "words"), RUNS, ids=str)
def test_plan_and_training(model, flags, changes, words, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_moe_lpr.training.setup.initialize_parallel", None)
    data = {name: str(inputs / name) for name in LANGUAGES}
    config = training_config(inputs / model, tmp_path / "run", data, **changes)
    with pytest.raises(UserError) as trained:
        prepare(config)
    batch = {"seq_length": 64, "micro_batch_size": 2, "global_batch_size": 64}
    planned = refusal(lambda: plan.find(plan.Flags(gpus=8, load=inputs / model, **{**batch, **flags})))
    assert words in str(trained.value) and planned and words in planned


@pytest.mark.parametrize("flag", [{"num_experts": 5}, {"top_k": 3}, {"moe_layer_freq": "2"}], ids=str)
def test_a_checkpoint_knows_its_experts(flag, inputs):
    with pytest.raises(UserError, match="leave the flag out"):
        plan.find(plan.Flags(gpus=8, load=inputs / "upcycled", seq_length=64, **flag))
