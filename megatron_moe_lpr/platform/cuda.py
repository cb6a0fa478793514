"""Requirements of the CUDA platform and facts about its device: run emulated, never on a device (docs/gpu.md)."""

import importlib.util
import re
from collections.abc import MutableMapping
from importlib import metadata

import torch
from packaging.version import Version

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.platform.facts import GPUFacts

INSTALL_HINT = "use the project's Docker image, or pip install 'megatron-moe-lpr[gpu]'"
MAX_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"
BLACKWELL = (10, 0)
GROUPED_PRODUCTS = {9: Version("2.8"), 10: Version("2.13")}
"""First number of a compute capability: the first PyTorch with a grouped product for it. Elsewhere PyTorch's function
multiplies one matrix after the other and waits for the device (aten/native/cuda/GroupedBlas.cpp); 2.10's kernel fails
on Blackwell."""
LOCAL_NOTE = (
    "note: Transformer Engine is not used here: layers are of PyTorch alone (--transformer-impl local); slower are the "
    "router, the sorting of tokens, SwiGLU, rotary embedding and loss, which take several kernels each, and there is "
    "no FP8"
)


def uses_transformer_engine(transformer_impl: str | None) -> bool:
    """Whether layers are Transformer Engine's: what the flag says, else whether it is installed on a machine of NVIDIA.

    Raises:
        UserError: Transformer Engine is asked for or installed, and does not import; `apex` is not NVIDIA's.
    """
    _refuse_foreign_apex()
    if torch.version.hip is not None and transformer_impl == "transformer_engine":
        raise UserError("--transformer-impl transformer_engine needs NVIDIA GPUs; on ROCm leave it out")
    if transformer_impl == "local" or (transformer_impl is None and not _may_have_engine()):
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # a wheel without its libraries raises RuntimeError
        raise UserError(
            f"Transformer Engine does not import ({error}); {INSTALL_HINT}, or uninstall it to compute without"
        ) from error
    return True


def _may_have_engine() -> bool:
    """Whether Transformer Engine is installed, working or not, on a machine of NVIDIA."""
    return torch.version.hip is None and importlib.util.find_spec("transformer_engine") is not None


def gpu_facts(transformer_engine: bool) -> GPUFacts:
    """Read capabilities of this rank's device and of the installed libraries.

    Args:
        transformer_engine: whether its layers are used.

    Raises:
        UserError: this PyTorch is built neither for CUDA nor for ROCm.
    """
    built_for = torch.version.cuda or torch.version.hip
    if built_for is None:
        raise UserError(f"--platform cuda: PyTorch {torch.__version__} is not built for CUDA; {INSTALL_HINT}")
    major, minor, *_ = (int(part) for part in re.findall(r"\d+", built_for))
    capability, rocm = torch.cuda.get_device_capability(), torch.version.hip is not None
    return GPUFacts(
        capability=capability,
        cuda=(major, minor),
        transformer_engine=Version(metadata.version("transformer-engine")) if transformer_engine else None,
        fused_weight_gradients=transformer_engine and _imports("fused_weight_gradient_mlp_cuda"),
        deep_ep=_imports("deep_ep"),
        hybrid_ep=_imports("deep_ep") and hasattr(importlib.import_module("deep_ep"), "HybridEPBuffer"),
        rocm=rocm,
        grouped_products=not rocm and multiplies_groups(capability, Version(torch.__version__)),
    )


def multiplies_groups(capability: tuple[int, int], version: Version) -> bool:
    """Whether this version of PyTorch multiplies several matrices of bf16 in one launch on an NVIDIA device."""
    first = GROUPED_PRODUCTS.get(capability[0])
    return first is not None and Version(version.base_version) >= first


def order_kernel_launches(environment: MutableMapping[str, str], tensor_parallel_size: int) -> None:
    """Set CUDA_DEVICE_MAX_CONNECTIONS=1 for tensor parallelism; call it before CUDA is initialised.

    With one hardware queue kernels start in the order of their launches. Megatron's tensor-parallel layers launch a
    collective before the matrix product that hides it (tensor_parallel/layers.py); with more queues, on Hopper and
    older, the product may occupy every multiprocessor first, and the collective waits until the product has ended.
    Without tensor parallelism no code relies on the order, and CUDA's default of 8 queues is kept.
    """
    if tensor_parallel_size > 1:
        environment.setdefault(MAX_CONNECTIONS, "1")


def keep_fp32_products(environment: MutableMapping[str, str]) -> None:
    """Set NVIDIA_TF32_OVERRIDE=0 unless the user has set it; call it before CUDA is initialised.

    Transformer Engine multiplies fp32 matrices in TF32, with 10 bits of mantissa, and has no switch of its own
    (common/gemm/cublaslt_gemm.cu: "Use TF32 only for pure FP32 GEMM"). Products in bf16 and FP8 are not affected.
    """
    environment.setdefault(TF32_OVERRIDE, "0")


def check_kernel_launch_order(environment: MutableMapping[str, str], tensor_parallel_size: int, gpu: GPUFacts) -> None:
    """Refuse another value of the variable that `order_kernel_launches` sets. Blackwell orders launches by priority,
    and ROCm does not read it.

    Raises:
        UserError: naming the variable.
    """
    value = environment.get(MAX_CONNECTIONS)
    if tensor_parallel_size > 1 and not gpu.rocm and gpu.capability < BLACKWELL and value != "1":
        raise UserError(f"{MAX_CONNECTIONS}={value}: --tensor-model-parallel-size over 1 needs 1 on this device")


def _imports(module: str) -> bool:
    """Whether a module exists and can load its libraries."""
    if importlib.util.find_spec(module) is None:
        return False
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def _refuse_foreign_apex() -> None:
    """Any package named `apex` makes Megatron choose NVIDIA's kernels; PyPI's is an unrelated web library."""
    if importlib.util.find_spec("apex") is None:
        return
    try:
        nvidias = importlib.util.find_spec("apex.normalization") is not None
    except ModuleNotFoundError:  # a single file named apex.py
        nvidias = False
    if not nvidias:
        raise UserError("the installed package 'apex' is not NVIDIA's; run: pip uninstall apex")
