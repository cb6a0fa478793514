"""Capabilities of a device and of the libraries for it, as data that tests can make up."""

import dataclasses

from packaging.version import Version


@dataclasses.dataclass(frozen=True)
class CPUFacts:
    """The processor of this rank."""

    multiplies_bf16: bool = True
    """The processor has instructions for products in bfloat16; without them torch is many times slower."""


@dataclasses.dataclass(frozen=True)
class GPUFacts:
    """The device of this rank and the installed libraries."""

    capability: tuple[int, int]
    """Compute capability: (8, 9) Ada, (9, 0) Hopper, (10, 0) Blackwell; of AMD's devices torch's number for them."""
    cuda: tuple[int, int]
    """Version of CUDA, or of ROCm, that PyTorch was built for."""
    transformer_engine: Version | None
    """Version of Transformer Engine; None where it is missing or not used."""
    fused_weight_gradients: bool = False
    """NVIDIA apex's `fused_weight_gradient_mlp_cuda` imports."""
    deep_ep: bool = False
    """DeepEP imports."""
    hybrid_ep: bool = False
    """It has HybridEPBuffer."""
    rocm: bool = False
    """PyTorch is built for AMD's devices."""
    grouped_products: bool = False
    """PyTorch has a kernel for this device that multiplies several matrices of bf16 in one launch."""

    @property
    def multiplies_bf16(self) -> bool:
        """Whether the device has instructions for bfloat16: NVIDIA's from Ampere on."""
        return self.rocm or self.capability >= (8, 0)
