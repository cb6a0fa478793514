"""What a model computes in: flags, what the checkpoint says, and processors without instructions for bfloat16."""

import dataclasses
import re

import pytest
import torch

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration import dtype as module
from megatron_moe_lpr.model.configuration.dtype import check_dtype_device, choose_dtype, report_dtype, requested_dtype
from megatron_moe_lpr.platform import CPUFacts, GPUFacts, Platform
from megatron_moe_lpr.platform.cpu.processor import multiplies_bf16

CPU = Platform("cpu", "gloo", torch.device("cpu"), transformer_engine=False, cpu=CPUFacts(multiplies_bf16=True))
OLD_CPU = dataclasses.replace(CPU, cpu=CPUFacts(multiplies_bf16=False))
GPU = Platform("cuda", "nccl", torch.device("cuda"), transformer_engine=True, cpu=CPUFacts(multiplies_bf16=False))
OLD_GPU = dataclasses.replace(GPU, transformer_engine=False, gpu=GPUFacts((7, 5), (12, 8), None))


@pytest.mark.parametrize(
    ("default", "platform", "chosen"),
    [
        ("bfloat16", CPU, torch.bfloat16),
        ("bfloat16", GPU, torch.bfloat16),
        ("bfloat16", OLD_CPU, torch.float32),
        ("bfloat16", OLD_GPU, torch.float32),
        ("float32", OLD_CPU, torch.float32),
        ("float32", CPU, torch.float32),
    ],
)
def test_the_default(default, platform, chosen):
    assert choose_dtype(None, default, platform) == chosen


def test_a_flag_decides():
    assert choose_dtype(torch.bfloat16, "float32", OLD_CPU) == torch.bfloat16
    assert choose_dtype(torch.float32, "bfloat16", GPU) == torch.float32


def test_flags():
    assert requested_dtype(False, False) is None
    assert requested_dtype(True, False) == torch.bfloat16 and requested_dtype(False, True) == torch.float32
    with pytest.raises(UserError, match=r"^--bf16 and --fp16: give one of them$"):
        requested_dtype(True, False, True)
    with pytest.raises(UserError, match=r"^--fp16: .* give --bf16 or --fp32: .* keep their float16 bits with both$"):
        requested_dtype(False, False, True)


def said(capsys, *arguments) -> str:
    report_dtype(*arguments)
    return capsys.readouterr().err


def test_a_note_where_the_default_is_not_the_checkpoints(capsys):
    found = said(capsys, None, "bfloat16", "bfloat16", OLD_CPU)
    assert found.startswith("note: computing in float32: this processor has no instructions for bfloat16")
    assert found.count("\n") == 1


def test_a_gpu_without_bf16(capsys):
    """The checkpoint's default gives way, with a note; asked for, bf16 is refused before anything is built."""
    found = said(capsys, None, "bfloat16", "bfloat16", OLD_GPU)
    assert found == "note: computing in float32: this GPU has no instructions for bfloat16, the checkpoint's default\n"
    with pytest.raises(UserError, match=r"--bf16 needs compute capability 8\.0, and this device has 7\.5; give --fp32"):
        check_dtype_device(torch.bfloat16, OLD_GPU)
    check_dtype_device(torch.float32, OLD_GPU)
    assert said(capsys, torch.float32, "bfloat16", "bfloat16", OLD_GPU) == ""


def test_layers_that_no_flag_chose_are_named(capsys):
    assert said(capsys, None, "bfloat16", "bfloat16", dataclasses.replace(GPU, note="note: local")) == "note: local\n"


def test_ranks_with_and_without_transformer_engine_are_refused():
    without = [(torch.bfloat16, False)]
    found = module._difference([(torch.bfloat16, True), *without * 2])
    assert re.fullmatch(r"ranks 1, 2 have no Transformer Engine, .* --transformer-impl local", found)
    assert "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 503 more have" in module._difference(
        [(torch.bfloat16, True), *without * 511]
    )
    assert module._difference(without * 3) is None


def test_a_note_where_a_float16_model_is_computed_otherwise(capsys):
    assert "a float16 model, computed in bfloat16" in said(capsys, None, "bfloat16", "float16", CPU)


@pytest.mark.parametrize(
    "arguments",
    [
        (None, "bfloat16", "bfloat16", CPU),
        (None, "float32", "float32", OLD_CPU),
        (torch.bfloat16, "bfloat16", "bfloat16", GPU),
        (torch.bfloat16, "bfloat16", "bfloat16", CPU),
        (torch.float32, "bfloat16", "bfloat16", OLD_CPU),
    ],
)
def test_nothing_is_said_where_there_is_nothing_to_say(arguments, capsys):
    assert said(capsys, *arguments) == ""


def test_slow_bf16_is_told_with_the_measured_ratio(capsys, monkeypatch):
    monkeypatch.setattr(module, "product_seconds", {torch.bfloat16: 0.5, torch.float32: 0.04}.get)
    found = said(capsys, torch.bfloat16, "bfloat16", "bfloat16", OLD_CPU)
    assert "a matrix product takes 12.5 times as long as in fp32, measured now" in found


def test_the_ratio_is_measured(capsys):
    assert re.search(r"takes \d+\.\d times", said(capsys, torch.bfloat16, "bfloat16", "bfloat16", OLD_CPU))
    assert module.product_seconds(torch.bfloat16) > 0


@pytest.mark.parametrize(
    ("capabilities", "found"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_f": True, "avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True, "bf16": False}, False),
        ({"avx2": True}, False),
    ],
)
def test_the_processor_is_asked(capabilities, found, monkeypatch):
    """Names as torch.cpu.get_capabilities documents them; CPUs with bf16 conversion alone have no products."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert multiplies_bf16() is found


@pytest.mark.parametrize(
    ("dtype", "recorded", "default"),
    [
        ("float16", [], "bfloat16"),
        ("float16", ["float32"], "float32"),
        ("float32", ["bfloat16"], "bfloat16"),
        ("bfloat16", ["bfloat16", "float32"], "float32"),
        ("bfloat16", [None], "bfloat16"),
        ("bfloat16", [["float32"]], "bfloat16"),
    ],
)
def test_a_checkpoints_default_is_what_the_last_run_computed_in(dtype, recorded, default):
    """Expansion leaves an entry without one; what is no dtype is passed over."""
    history = [{"stage": "1"} if name is None else {"stage": "1", "dtype": name} for name in recorded]
    card = CheckpointCard("llama", [1], 1, dtype, "sha256:0", history=history)
    assert card.compute_dtype == default
