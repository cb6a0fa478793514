"""FP8 flags of a training run: refused with one line, before a model or a process group is built."""

import pytest
import torch
from packaging.version import Version

from megatron_moe_lpr.engine.options import OptimizerOptions
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.fp8 import FP8Options
from megatron_moe_lpr.platform import GPUFacts, Platform
from megatron_moe_lpr.training.configuration.model_checks import check_fp8_param_gather
from megatron_moe_lpr.training.configuration.stages import STAGES
from megatron_moe_lpr.training.setup import prepare
from tests.training.runs import make_checkpoint, make_data, training_config

CUDA = Platform(
    "cuda", "nccl", torch.device("cuda"), transformer_engine=True, gpu=GPUFacts((9, 0), (13, 0), Version("2.11"))
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return make_checkpoint(root), make_data(root)


@pytest.mark.parametrize(
    ("precision", "fp8", "message"),
    [
        ({"fp32": True}, {}, "--fp8-format needs bf16"),
        ({"fp32": False, "bf16": True}, {}, "needs NVIDIA GPUs, and this run is on --platform cpu"),
        ({"fp32": False, "bf16": True}, {"fp8_recipe": "mxfp8"}, "FFN columns of a rank is 48, not a multiple of 32"),
        ({"fp32": False, "bf16": True, "seq_length": 20}, {}, "--micro-batch-size x --seq-length of a rank is 40"),
    ],
)
def test_refused_before_anything_is_built(precision, fp8, message, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_moe_lpr.training.setup.initialize_parallel", None)
    config = training_config(inputs[0], tmp_path / "run", inputs[1], **precision, fp8_format="hybrid", **fp8)
    with pytest.raises(UserError, match=message):
        prepare(config)
    assert not (tmp_path / "run").exists()


def test_fp8_weights_need_experts_that_train():
    gather = FP8Options(fp8_format="hybrid", fp8_param_gather=True)
    optimizer = OptimizerOptions(use_distributed_optimizer=True)
    check_fp8_param_gather(gather, STAGES["1"], False, optimizer)
    with pytest.raises(UserError, match="stage 2 keeps the new experts frozen"):
        check_fp8_param_gather(gather, STAGES["2"], False, optimizer)


def test_overlap_is_the_default_on_gpus_only(cpu_platform):
    given = OptimizerOptions()
    assert given.with_platform_defaults(cpu_platform) == given
    resolved = given.with_platform_defaults(CUDA)
    assert resolved.use_distributed_optimizer and resolved.overlap_grad_reduce and resolved.overlap_param_gather
    assert OptimizerOptions(overlap_on_gpus=False).with_platform_defaults(CUDA) == OptimizerOptions(
        overlap_on_gpus=False
    )
