"""Flags that say how a model is computed. Imports neither torch nor Megatron at the top, for a fast --help."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

from megatron_moe_lpr.flag_marks import Free, Overlap, RecordedAs, T
from megatron_moe_lpr.flag_ranges import PositiveInt
from megatron_moe_lpr.model.configuration.fp8 import FP8Options
from megatron_moe_lpr.platform import TransformerImpl

if TYPE_CHECKING:
    import torch

Kernel = Annotated[T, Free("which kernel computes it: rounding alone")]
Recomputation = Annotated[T, Free("computes the same twice")]


@dataclasses.dataclass(frozen=True)
class ComputeOptions:
    """How the model is computed: number formats, dispatch of tokens to experts, activation recomputation."""

    bf16: Annotated[bool, RecordedAs("dtype")] = False
    """Compute in bfloat16, with fp32 gradients, routers and optimizer. Default: what the run before computed in, or the
    checkpoint's own dtype; for a float16 one bfloat16. CPUs without bf16 instructions compute in fp32 by default."""
    fp32: Annotated[bool, RecordedAs("dtype")] = False
    """Compute in fp32."""
    fp16: Annotated[bool, Free("refused")] = False
    """Not offered: float16 models train in bf16 or fp32, and frozen weights keep their float16 bits."""
    transformer_impl: Annotated[TransformerImpl | None, Free("rounding alone")] = None
    """Whose layers compute. local: PyTorch's alone, slower and without FP8. Default: Transformer Engine's on GPUs where
    it is installed, else local."""
    moe_token_dispatcher_type: Annotated[
        Literal["alltoall", "allgather", "flex"], Free("how tokens travel: rounding alone")
    ] = "alltoall"
    """Communication of tokens to new experts on other ranks. flex needs DeepEP."""
    moe_flex_dispatcher_backend: Annotated[Literal["deepep", "hybridep"], Free("how tokens travel: rounding alone")] = (
        "deepep"
    )
    """With --moe-token-dispatcher-type flex: DeepEP, or its HybridEP for nodes joined by NVLink. Never run."""
    original_expert_overlap: Overlap[bool] = False
    """With EP on GPUs, compute the original expert on its own stream during the all-to-all. Never timed on a GPU."""
    moe_permute_fusion: Kernel[bool] = True
    """On GPUs, sort tokens by expert in one kernel of Transformer Engine, from version 2.1 on."""
    moe_router_fusion: Kernel[bool] = True
    """On GPUs, softmax, top-k and renormalisation of the router in one kernel of Transformer Engine, from 2.7 on."""
    gradient_accumulation_fusion: Kernel[bool] = True
    """On GPUs, matrix products add weight gradients to the fp32 buffer themselves. The output matrix needs NVIDIA apex
    for it."""
    deterministic_mode: Annotated[bool, Free("the order of sums: rounding alone")] = False
    """On GPUs, add up in the same order in every run, so that a resumed run has the bits of one without a break. Slower
    by an unknown amount; never run on a GPU. CPUs do so anyway."""
    recompute_granularity: Recomputation[Literal["full", "selective"] | None] = None
    """Recompute activations in the backward pass: whole layers, or --recompute-modules."""
    recompute_method: Recomputation[Literal["uniform", "block"] | None] = None
    """Full recompute. uniform: groups of --recompute-num-layers layers; block: only the first so many of a PP stage."""
    recompute_num_layers: Recomputation[PositiveInt | None] = None
    """Layers for --recompute-method. Default: 1."""
    recompute_modules: Recomputation[tuple[str, ...] | None] = None
    """Selective recompute: core_attn, moe_act, layernorm, mlp, moe. Default: core_attn."""
    fp8: FP8Options = dataclasses.field(default_factory=FP8Options)

    def requested_dtype(self) -> "torch.dtype | None":
        """Return the dtype that a flag names; None: no flag does. Raises UserError, see `dtype.requested_dtype`."""
        from megatron_moe_lpr.model.configuration.dtype import requested_dtype

        return requested_dtype(self.bf16, self.fp32, self.fp16)

    @property
    def dtype(self) -> "torch.dtype":
        """Dtype of activations and matrix products: bfloat16 with --bf16, else float32."""
        import torch

        return torch.bfloat16 if self.bf16 else torch.float32

    def with_dtype(self, dtype: "torch.dtype") -> "ComputeOptions":
        """Return these options with the flag that names `dtype` (bfloat16 or float32)."""
        import torch

        return dataclasses.replace(self, bf16=dtype == torch.bfloat16, fp32=dtype == torch.float32, fp16=False)
