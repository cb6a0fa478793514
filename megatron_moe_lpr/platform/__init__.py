"""Where the code runs: GPUs with NCCL, with or without Transformer Engine, or CPUs with gloo.

Only this package names CUDA, NCCL or gloo. Others read the fields of `Platform`, among them whether layers are
Transformer Engine's. AMD's GPUs are the platform `cuda` too, as in PyTorch's own builds for ROCm.

platform = select_platform("auto")      # before anything of Megatron is built
torch.distributed.init_process_group(platform.backend)
model.to(platform.device)
"""

import dataclasses
import os
from typing import TYPE_CHECKING, Literal

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.platform.facts import CPUFacts, GPUFacts

if TYPE_CHECKING:
    import torch

# Flags need this module before torch has been imported, which is therefore imported in functions.

# Tensors of 2 MB and more in host memory ask for transparent huge pages (torch's c10/core/impl/alloc_cpu.cpp). torch
# reads the variable when the process allocates its first tensor, while megatron-core is imported: before
# `select_platform` is called.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = ["CPUFacts", "GPUFacts", "Platform", "PlatformName", "TransformerImpl", "select_platform"]

PlatformName = Literal["auto", "cpu", "cuda"]
TransformerImpl = Literal["local", "transformer_engine"]
"""Megatron's names for its layers of PyTorch alone and for Transformer Engine's."""


@dataclasses.dataclass(frozen=True)
class Platform:
    """The chosen platform of this process."""

    name: Literal["cpu", "cuda"]
    backend: Literal["gloo", "nccl"]
    device: "torch.device"
    """Where this rank's parameters live."""
    transformer_engine: bool
    """Layers come from Transformer Engine; otherwise Megatron's local layers."""
    gpu: GPUFacts | None = None
    """Capabilities of the device; None on the CPU."""
    cpu: CPUFacts = dataclasses.field(default_factory=CPUFacts)
    """Capabilities of the processor, for the CPU platform."""
    note: str = ""
    """A line for the user about layers that were chosen without a flag; empty: nothing to say."""

    @property
    def on_gpus(self) -> bool:
        """Whether GPUs compute and NCCL communicates, with further groups over gloo."""
        return self.name == "cuda"

    @property
    def multiplies_bf16(self) -> bool:
        """Whether the GPU or processor has instructions for bfloat16."""
        return self.gpu.multiplies_bf16 if self.gpu else self.on_gpus or self.cpu.multiplies_bf16


_selected: Platform | None = None


def select_platform(
    name: PlatformName = "auto", tensor_parallel_size: int = 1, transformer_impl: TransformerImpl | None = None
) -> Platform:
    """Choose the platform once per process; `auto` takes CUDA where a device is visible.

    Choosing the CPU installs the replacements of `platform.cpu`. On CUDA with Transformer Engine only the permutation
    of no rows is replaced (`platform.no_rows`), without it the optimizer, SwiGLU and recompute (`platform.torch_only`).
    Environment variables keep fp32 products in fp32 and, with `tensor_parallel_size` over 1, let kernels start in the
    order of their launches.

    Args:
        transformer_impl: whose layers; None: Transformer Engine's on GPUs of NVIDIA where it is installed, else local
            ones, or what was chosen before.

    Raises:
        UserError: `cuda` without a CUDA device, layers that cannot run there, or another choice was made before.
    """
    import torch

    global _selected
    if name != "cpu" and _selected is None:
        from megatron_moe_lpr.platform.cuda import keep_fp32_products, order_kernel_launches

        order_kernel_launches(os.environ, tensor_parallel_size)
        keep_fp32_products(os.environ)
    if name == "auto":
        name = _selected.name if _selected else ("cuda" if torch.cuda.is_available() else "cpu")
    if _selected is not None:
        _refuse_another_choice(_selected, name, transformer_impl)
        return _selected
    if name == "cuda":
        _selected = _select_cuda(tensor_parallel_size, transformer_impl)
    else:
        _selected = _select_cpu(transformer_impl)
    return _selected


def _refuse_another_choice(selected: Platform, name: str, transformer_impl: TransformerImpl | None) -> None:
    if selected.name != name:
        raise UserError(f"--platform {name}: this process already runs on {selected.name}")
    if transformer_impl is not None and selected.transformer_engine != (transformer_impl == "transformer_engine"):
        raise UserError(f"--transformer-impl {transformer_impl}: this process has already chosen the other one")


def _select_cpu(transformer_impl: TransformerImpl | None) -> Platform:
    if transformer_impl == "transformer_engine":
        raise UserError("--transformer-impl transformer_engine needs NVIDIA GPUs, and this run is on --platform cpu")
    import torch

    from megatron_moe_lpr.platform import cpu
    from megatron_moe_lpr.platform.cpu.processor import multiplies_bf16

    cpu.install()
    facts = CPUFacts(multiplies_bf16())
    return Platform("cpu", "gloo", torch.device("cpu"), transformer_engine=False, cpu=facts)


def _select_cuda(tensor_parallel_size: int, transformer_impl: TransformerImpl | None) -> Platform:
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "--platform cuda: no CUDA device is visible to PyTorch; check nvidia-smi, or pass --platform cpu"
        )
    from megatron_moe_lpr.platform.cuda import LOCAL_NOTE, check_kernel_launch_order, gpu_facts, uses_transformer_engine

    engine = uses_transformer_engine(transformer_impl)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        visible = torch.cuda.device_count()
        raise UserError(f"local rank {local_rank} has no GPU, {visible} visible; lower torchrun's --nproc-per-node")
    torch.cuda.set_device(local_rank)
    facts = gpu_facts(engine)
    check_kernel_launch_order(os.environ, tensor_parallel_size, facts)
    if engine:
        from megatron_moe_lpr.platform import no_rows

        no_rows.install()
    else:
        from megatron_moe_lpr.platform import torch_only

        torch_only.install()
    note = "" if engine or transformer_impl else LOCAL_NOTE
    return Platform("cuda", "nccl", torch.device("cuda", local_rank), transformer_engine=engine, gpu=facts, note=note)
