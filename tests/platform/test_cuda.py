"""Checks of the CUDA platform that need no device."""

import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from megatron_moe_lpr import platform
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.platform import GPUFacts, Platform, select_platform
from megatron_moe_lpr.platform.cuda import (
    MAX_CONNECTIONS,
    TF32_OVERRIDE,
    check_kernel_launch_order,
    gpu_facts,
    keep_fp32_products,
    multiplies_groups,
    order_kernel_launches,
    uses_transformer_engine,
)

ROOT = Path(__file__).parents[2]
HOPPER, BLACKWELL = (GPUFacts(capability, (13, 0), None) for capability in ((9, 0), (10, 0)))


def test_pytorch_for_other_devices_is_refused(monkeypatch):
    """ROCm's builds have a working torch.cuda too."""
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match=r"--platform cuda: PyTorch .* is not built for CUDA; use the project's Docker"):
        gpu_facts(transformer_engine=False)


@pytest.fixture
def rocm(monkeypatch):
    """PyTorch as its builds for AMD's devices describe themselves, with an MI300X."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "6.4.43482-0f2d60242")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 4))


def test_rocm_is_the_same_platform_without_transformer_engine(rocm):
    facts = gpu_facts(uses_transformer_engine(None))
    assert (facts.rocm, facts.cuda, facts.transformer_engine, facts.grouped_products) == (True, (6, 4), None, False)
    assert facts.multiplies_bf16
    # The variable is CUDA's.
    check_kernel_launch_order({MAX_CONNECTIONS: "32"}, 2, facts)
    with pytest.raises(UserError, match="transformer_engine needs NVIDIA GPUs; on ROCm leave it out"):
        uses_transformer_engine("transformer_engine")


@pytest.mark.parametrize(
    ("capability", "version", "has_it"),
    [
        ((9, 0), "2.7.1", False),
        ((9, 0), "2.8.0+cu128", True),
        ((9, 0), "2.13.0a0+git", True),
        ((10, 0), "2.12.1", False),
        ((10, 0), "2.13.0", True),
        ((8, 0), "2.13.0", False),
        ((12, 0), "2.13.0", False),
    ],
)
def test_devices_with_grouped_products(capability, version, has_it):
    assert multiplies_groups(capability, Version(version)) == has_it


def test_bf16_begins_with_ampere():
    assert [GPUFacts(found, (12, 8), None).multiplies_bf16 for found in ((7, 5), (8, 0), (12, 0))] == [
        False,
        True,
        True,
    ]


def test_tensor_parallelism_orders_kernel_launches():
    environment = {}
    order_kernel_launches(environment, 1)
    assert environment == {}
    order_kernel_launches(environment, 2)
    assert environment == {MAX_CONNECTIONS: "1"}
    check_kernel_launch_order(environment, 2, HOPPER)


def test_an_environment_against_it_is_refused():
    environment = {MAX_CONNECTIONS: "32"}
    order_kernel_launches(environment, 2)
    assert environment == {MAX_CONNECTIONS: "32"}
    with pytest.raises(UserError, match="CUDA_DEVICE_MAX_CONNECTIONS=32: --tensor-model-parallel-size over 1 needs 1"):
        check_kernel_launch_order(environment, 2, HOPPER)
    check_kernel_launch_order(environment, 2, BLACKWELL)
    check_kernel_launch_order(environment, 1, HOPPER)


def test_fp32_means_fp32_unless_the_user_says_otherwise():
    environment = {}
    keep_fp32_products(environment)
    assert environment == {TF32_OVERRIDE: "0"}
    chosen = {TF32_OVERRIDE: "1"}
    keep_fp32_products(chosen)
    assert chosen == {TF32_OVERRIDE: "1"}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that makes a module importable for this test alone, from its file's name and text."""
    monkeypatch.syspath_prepend(tmp_path)
    packages = []

    def install(file: str, text: str) -> None:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        packages.append(file.split("/")[0].removesuffix(".py"))
        for name in [name for name in sys.modules if name.split(".")[0] == packages[-1]]:
            monkeypatch.delitem(sys.modules, name)

    yield install
    for package in packages:
        sys.modules.pop(package, None)


@pytest.mark.parametrize("file", ["apex.py", "apex/__init__.py"])
def test_another_package_named_apex_is_refused(file, installed):
    """PyPI's is a web library: Megatron would look for NVIDIA's kernels in it."""
    installed(file, "")
    for choice in (None, "local", "transformer_engine"):
        with pytest.raises(UserError, match="the installed package 'apex' is not NVIDIA's; run: pip uninstall apex"):
            uses_transformer_engine(choice)


def test_transformer_engine_without_its_libraries_is_named(installed):
    """Its bare wheel raises RuntimeError at import."""
    installed("transformer_engine/__init__.py", "raise RuntimeError('an empty package')")
    for choice in (None, "transformer_engine"):
        with pytest.raises(UserError, match=r"\(an empty package\); use the .* or uninstall it to compute without"):
            uses_transformer_engine(choice)
    assert not uses_transformer_engine("local")


def test_layers_without_transformer_engine(monkeypatch):
    """Left open, the layers of PyTorch alone are chosen where it is not installed; asked for, it must be there."""
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    assert not uses_transformer_engine(None)
    with pytest.raises(UserError, match=r"Transformer Engine does not import \(.*\); use the project's Docker image"):
        uses_transformer_engine("transformer_engine")


def test_a_second_choice_in_a_process_is_refused(monkeypatch):
    chosen = Platform("cuda", "nccl", torch.device("cuda", 0), transformer_engine=False)
    monkeypatch.setattr(platform, "_selected", chosen)
    assert select_platform("cuda", transformer_impl="local") is chosen
    assert select_platform("cuda") is chosen
    with pytest.raises(UserError, match="--transformer-impl transformer_engine: this process has already chosen"):
        select_platform("cuda", transformer_impl="transformer_engine")


def test_the_cpu_has_local_layers_alone(cpu_platform, monkeypatch):
    monkeypatch.setattr(platform, "_selected", None)
    with pytest.raises(UserError, match="--transformer-impl transformer_engine needs NVIDIA GPUs"):
        select_platform("cpu", transformer_impl="transformer_engine")


def test_the_package_cannot_reach_the_emulated_transformer_engine():
    """The package names neither the emulation's variable nor its module, and imports no tests."""
    for path in (ROOT / "megatron_moe_lpr").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for forbidden in ("NVTE_PROJECT_BUILDING", "transformer_engine_torch", "from tests", "import tests"):
            assert forbidden not in text, f"{path}: {forbidden}"
