"""Checks of the CUDA platform that need no device."""

import sys
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.platform.cuda import (
    MAX_CONNECTIONS,
    TF32_OVERRIDE,
    check_kernel_launch_order,
    gpu_facts,
    keep_fp32_products,
    order_kernel_launches,
    require_transformer_engine,
)

ROOT = Path(__file__).parents[2]
HOPPER, BLACKWELL = (9, 0), (10, 0)


def test_pytorch_for_other_devices_is_refused(monkeypatch):
    """ROCm's builds have a working torch.cuda too."""
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match=r"--platform cuda: PyTorch .* is not built for CUDA; use the project's Docker"):
        gpu_facts()


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
    with pytest.raises(UserError, match="the installed package 'apex' is not NVIDIA's; run: pip uninstall apex"):
        require_transformer_engine()


def test_transformer_engine_without_its_libraries_is_named(installed):
    """Its bare wheel raises RuntimeError at import."""
    installed("transformer_engine/__init__.py", "raise RuntimeError('an empty package')")
    with pytest.raises(UserError, match=r"Transformer Engine does not import \(an empty package\); use the project's"):
        require_transformer_engine()


def test_the_package_cannot_reach_the_emulated_transformer_engine():
    """The package names neither the emulation's variable nor its module, and imports no tests."""
    for path in (ROOT / "megatron_moe_lpr").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for forbidden in ("NVTE_PROJECT_BUILDING", "transformer_engine_torch", "from tests", "import tests"):
            assert forbidden not in text, f"{path}: {forbidden}"
