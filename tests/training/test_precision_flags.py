"""What training, evaluation and verification compute in by default, and that all ranks agree on it."""

import dataclasses
import json

import pytest
import torch

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.conversion.verification import verify_models
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation import checkpoint as evaluation
from megatron_moe_lpr.evaluation.options import EvaluationOptions
from megatron_moe_lpr.files.checksum_file import write_checksums
from megatron_moe_lpr.model.configuration.dtype import report_dtype
from megatron_moe_lpr.platform import CPUFacts, Platform
from megatron_moe_lpr.training import setup
from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, make_data, training_config

CPU = Platform("cpu", "gloo", torch.device("cpu"), transformer_engine=False)
OLD_CPU = dataclasses.replace(CPU, cpu=CPUFacts(multiplies_bf16=False))
CASES = [
    ("float16", CPU, {}, torch.bfloat16),
    ("float16", OLD_CPU, {}, torch.float32),
    ("bfloat16", CPU, {}, torch.bfloat16),
    ("bfloat16", OLD_CPU, {}, torch.float32),
    ("bfloat16", OLD_CPU, {"bf16": True}, torch.bfloat16),
    ("float32", OLD_CPU, {}, torch.float32),
]


class Reached(Exception):
    """The place where the test looks."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    return make_checkpoint(root), make_data(root)


@pytest.fixture
def checkpoint(inputs):
    """Makes the card say a dtype; the tensors are not reached."""

    def saying(dtype):
        directory = resolve_checkpoint(inputs[0])
        card = directory.side_directory / "card.json"
        card.write_text(json.dumps(json.loads(card.read_text()) | {"dtype": dtype}))
        write_checksums(directory.path, {})
        return inputs[0]

    return saying


@pytest.mark.parametrize(("dtype", "platform", "flags", "expected"), CASES)
def test_training(dtype, platform, flags, expected, checkpoint, inputs, tmp_path, monkeypatch):
    def check_platform(shape, layout, options, found):
        assert (options.dtype, found) == (expected, platform)
        raise Reached

    monkeypatch.setattr(setup, "select_platform", lambda *arguments: platform)
    monkeypatch.setattr(setup, "check_platform", check_platform)
    config = training_config(checkpoint(dtype), tmp_path / "run", inputs[1], fp32=False, **flags)
    with pytest.raises(Reached):
        setup.prepare(config)


@pytest.mark.parametrize(("dtype", "platform", "flags", "expected"), CASES)
def test_evaluation(dtype, platform, flags, expected, checkpoint, inputs, monkeypatch):
    def load_model(directory, layout, found, options, verified):
        assert (options.dtype, found) == (expected, platform)
        raise Reached

    monkeypatch.setattr(evaluation, "select_platform", lambda *arguments: platform)
    monkeypatch.setattr(evaluation, "initialize_parallel", lambda *arguments, **more: None)
    monkeypatch.setattr(evaluation, "load_model", load_model)
    plan = EvaluationOptions(checkpoint(dtype), [inputs[1]["el"]], [], 32, 2, bf16=bool(flags), platform="cpu")
    with pytest.raises(Reached):
        evaluation.evaluate_checkpoint(plan)


def test_verification_in_slow_bf16_is_told(checkpoint, inputs, monkeypatch, capsys):
    def forward(*arguments):
        raise Reached

    monkeypatch.setattr(verify_models, "megatron_forward", forward)
    with pytest.raises(Reached):
        verify_models.verify_checkpoint(
            checkpoint("float32"), inputs[0].parent / "hf", torch.bfloat16, OLD_CPU, sequence_length=8
        )
    assert "warning: this processor has no instructions for bfloat16" in capsys.readouterr().err


def test_float16_arithmetic_is_refused_with_the_way_out(checkpoint, inputs, tmp_path):
    config = training_config(checkpoint("float16"), tmp_path / "run", inputs[1], fp32=False, fp16=True)
    with pytest.raises(
        UserError, match=r"^--fp16: float16 arithmetic is not offered.* give --bf16 or --fp32"
    ) as caught:
        setup.prepare(config)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_ranks_with_other_processors_do_not_compute_in_another_dtype():
    found = rank_pool(2).run(refusal)
    assert found[0] == found[1] and "the devices of ranks 1 have no instructions for bfloat16" in found[0]


def refusal() -> str:
    """On every rank of a pool, of which the last one's processor is older."""
    platform = OLD_CPU if torch.distributed.get_rank() else CPU
    report_dtype(torch.float32, "bfloat16", "bfloat16", platform)
    with pytest.raises(UserError) as caught:
        report_dtype(None, "bfloat16", "bfloat16", platform)
    return str(caught.value)
