"""Flags of FP8 against model, layout, device and each other: every refusal before anything is built."""

import pytest
import torch
from packaging.version import Version

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.architecture import read_architecture
from megatron_moe_lpr.model.configuration.fp8 import (
    RECIPES,
    FP8Options,
    check_fp8_device,
    check_fp8_flags,
    check_fp8_shapes,
    row_alignment,
)
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import GPUFacts, Platform
from tests.model.sizes import SMALL

ARCHITECTURE = read_architecture(
    SMALL | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
)
TP2 = ParallelLayout(tensor_model_parallel_size=2)


def gpu(capability=(9, 0), cuda=(13, 0), version="2.11.0") -> Platform:
    facts = GPUFacts(capability, cuda, Version(version))
    return Platform("cuda", "nccl", torch.device("cuda", 0), transformer_engine=True, gpu=facts)


def options(recipe="tensorwise", **changes) -> FP8Options:
    return FP8Options(fp8_format="hybrid", fp8_recipe=recipe, **changes)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_fitting_run_passes(recipe):
    device = gpu(capability=(10, 0))
    check_fp8_flags(options(recipe), torch.bfloat16)
    check_fp8_shapes(options(recipe), ARCHITECTURE, TP2, tokens=4096)
    check_fp8_device(options(recipe), device)


def test_without_fp8_nothing_is_asked():
    check_fp8_flags(FP8Options(), torch.float32)
    check_fp8_shapes(FP8Options(), read_architecture(SMALL), ParallelLayout(), tokens=7)


@pytest.mark.parametrize(
    ("given", "dtype", "message"),
    [
        (options(), torch.float32, "--fp8-format needs bf16"),
        (FP8Options(fp8_param_gather=True), torch.bfloat16, "--fp8-param-gather needs --fp8-format"),
        (FP8Options(first_last_layers_bf16=True), torch.bfloat16, "--first-last-layers-bf16 needs --fp8-format"),
        (options("delayed", first_last_layers_bf16=True), torch.bfloat16, "recipe delayed keeps one history"),
        (options("mxfp8", fp8_param_gather=True), torch.bfloat16, "not supported with --fp8-recipe mxfp8"),
        (
            options("delayed", fp8_param_gather=True),
            torch.bfloat16,
            "not supported with --fp8-recipe delayed: .*tensorwise",
        ),
    ],
)
def test_flags_that_do_not_go_together(given, dtype, message):
    with pytest.raises(UserError, match=message):
        check_fp8_flags(given, dtype)


@pytest.mark.parametrize(
    ("recipe", "changes", "layout", "tokens", "message"),
    [
        ("delayed", {"hidden_size": 264, "head_dim": 32}, ParallelLayout(), None, "the hidden size is 264, .* 16"),
        ("delayed", {"intermediate_size": 528}, TP2, None, "FFN columns of a rank is 264"),
        ("mxfp8", {"intermediate_size": 528}, ParallelLayout(), None, "FFN columns of a rank is 528, .* 32"),
        ("delayed", {"head_dim": 18}, TP2, None, "attention heads x head dimension of a rank is 72"),
        ("delayed", {}, TP2, 2 * 24, "--micro-batch-size x --seq-length of a rank is 24"),
        ("blockwise", {}, TP2, 2 * 64, "of a rank is 64, not a multiple of 128"),
        ("blockwise", {"hidden_size": 320, "head_dim": 32}, TP2, None, "gathered by sequence parallelism is 320"),
    ],
)
def test_shapes_that_do_not_fit(recipe, changes, layout, tokens, message):
    fields = SMALL | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    with pytest.raises(UserError, match=message):
        check_fp8_shapes(options(recipe), read_architecture(fields | changes), layout, tokens)


def test_layers_in_bf16_lie_in_one_stage():
    given = options(first_last_layers_bf16=True, num_layers_at_end_in_bf16=2)
    with pytest.raises(UserError, match=r"--num-layers-at-end-in-bf16 2: .* the 1 layers"):
        check_fp8_shapes(given, ARCHITECTURE, ParallelLayout(pipeline_model_parallel_size=2))


@pytest.mark.parametrize(
    ("recipe", "device", "message"),
    [
        ("delayed", gpu(capability=(8, 0)), "needs compute capability 8.9.* has 8.0; leave --fp8-format out"),
        ("blockwise", gpu(capability=(8, 9)), "needs compute capability 9.0.*choose --fp8-recipe delayed or tensor"),
        ("mxfp8", gpu(), "needs compute capability 10.0"),
        ("mxfp8", gpu(capability=(12, 0)), "no MXFP8 for compute capability 12"),
        ("blockwise", gpu(version="2.2.1"), "needs Transformer Engine 2.3, and 2.2.1 is installed"),
        ("blockwise", gpu(cuda=(12, 8)), "needs CUDA 12.9, and PyTorch was built for 12.8"),
        ("delayed", Platform("cpu", "gloo", torch.device("cpu"), transformer_engine=False), "needs NVIDIA GPUs"),
    ],
)
def test_devices_that_do_not_fit(recipe, device, message):
    with pytest.raises(UserError, match=message):
        check_fp8_device(options(recipe), device)


def test_rows_gathered_by_sequence_parallelism_are_aligned_further():
    assert row_alignment("blockwise", sequence_parallel=False) == 16
    assert row_alignment("blockwise", sequence_parallel=True) == 128
    assert row_alignment("mxfp8", sequence_parallel=True) == 32


def test_fp8_parameters_are_the_new_experts_alone():
    """Megatron's own switch would round the frozen original weights."""
    fields = options(fp8_param_gather=True).transformer_fields()
    assert "fp8_param" not in fields
    assert fields["fp8_new_expert_parameters"]
