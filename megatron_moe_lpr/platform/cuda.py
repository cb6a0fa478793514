"""Requirements of the CUDA platform and facts about its device: run emulated, never on a device (docs/gpu.md)."""

import importlib.util
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


def require_transformer_engine() -> None:
    """Check that Transformer Engine imports and that `apex`, where present, is NVIDIA's.

    Raises:
        UserError: naming the package that is missing, or that hides NVIDIA's.
    """
    _refuse_foreign_apex()
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # a wheel without its libraries raises RuntimeError
        raise UserError(f"Transformer Engine does not import ({error}); {INSTALL_HINT}") from error


def gpu_facts() -> GPUFacts:
    """Read capabilities of this rank's device and of the installed libraries.

    Raises:
        UserError: this PyTorch is not built for CUDA.
    """
    if torch.version.cuda is None:
        raise UserError(f"--platform cuda: PyTorch {torch.__version__} is not built for CUDA; {INSTALL_HINT}")
    major, minor, *_ = (int(part) for part in torch.version.cuda.split("."))
    return GPUFacts(
        capability=torch.cuda.get_device_capability(),
        cuda=(major, minor),
        transformer_engine=Version(metadata.version("transformer-engine")),
        fused_weight_gradients=_imports("fused_weight_gradient_mlp_cuda"),
        deep_ep=_imports("deep_ep"),
        hybrid_ep=_imports("deep_ep") and hasattr(importlib.import_module("deep_ep"), "HybridEPBuffer"),
    )


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


def check_kernel_launch_order(
    environment: MutableMapping[str, str], tensor_parallel_size: int, capability: tuple[int, int]
) -> None:
    """Refuse another value of the variable that `order_kernel_launches` sets; Blackwell orders launches by priority.

    Raises:
        UserError: naming the variable.
    """
    value = environment.get(MAX_CONNECTIONS)
    if tensor_parallel_size > 1 and capability < BLACKWELL and value != "1":
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
