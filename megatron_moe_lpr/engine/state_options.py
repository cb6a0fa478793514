"""Flags that say in which formats the optimizer keeps its state. Imports neither torch nor Megatron."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_marks import Acceptable, Free, Overlap
from megatron_moe_lpr.flag_ranges import Range
from megatron_moe_lpr.platform import Platform

if TYPE_CHECKING:
    import torch

StateDtype = Literal["fp32", "bf16", "fp16", "fp8"]
GradientDtype = Literal["fp32", "bf16"]
WeightDtype = Literal["fp32", "fp16"]
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
SCALED = (
    "is scaled by the largest value of each rank's part, which another layout or a resumed run would round anew; choose"
)
"""Why formats with a scale are refused (Transformer Engine's FusedAdam `_apply_scale`)."""


@dataclasses.dataclass(frozen=True)
class OptimizerStateOptions:
    """Formats of Adam's moments, of gradients and of the optimizer's own weights."""

    use_precision_aware_optimizer: Annotated[bool, Free("where the fp32 weights are kept: the same numbers")] = False
    """In bf16 on GPUs, let Transformer Engine's FusedAdam keep of its fp32 weights only the 16 bits that the bf16
    weights lack, and allow the next four flags."""
    exp_avg_dtype: Acceptable[StateDtype] = "fp32"
    """Dtype of Adam's first moment: fp32 or bf16."""
    exp_avg_sq_dtype: Acceptable[StateDtype] = "fp32"
    """Dtype of Adam's second moment: fp32 or bf16."""
    main_grads_dtype: Acceptable[GradientDtype] = "fp32"
    """Dtype in which gradients are added up and sent; those of routers stay fp32."""
    main_params_dtype: Annotated[WeightDtype, Free("only fp32 is taken")] = "fp32"
    """Dtype of the optimizer's own weights: fp32."""
    optimizer_cpu_offload: Annotated[bool, Free("where the state lies: rounding alone")] = False
    """Keep fp32 weights and moments in host memory and step there; needs --use-precision-aware-optimizer."""
    optimizer_offload_fraction: Annotated[float, Range(0, 1), Free("only 1 is taken")] = 1.0
    """With --optimizer-cpu-offload: the share of the state that lies on the host: 1."""
    overlap_cpu_optimizer_d2h_h2d: Overlap[bool] = False
    """With --optimizer-cpu-offload: step each parameter while others are copied."""

    def __post_init__(self) -> None:
        """Raises UserError: a format that is not offered, or one that --use-precision-aware-optimizer must allow."""
        for name in ("exp_avg_dtype", "exp_avg_sq_dtype", "main_grads_dtype", "main_params_dtype"):
            flag, value = f"--{name.replace('_', '-')}", getattr(self, name)
            if value in ("fp16", "fp8"):
                offered = "fp32" if name == "main_params_dtype" else "fp32 or bf16"
                raise UserError(f"{flag} {value}: {SCALED} {offered}")
            if value != "fp32" and not self.use_precision_aware_optimizer:
                raise UserError(f"{flag} {value}: needs --use-precision-aware-optimizer")
        self._check_offload()

    def _check_offload(self) -> None:
        flag, fraction = "--optimizer-cpu-offload", self.optimizer_offload_fraction
        if not self.optimizer_cpu_offload:
            if self.overlap_cpu_optimizer_d2h_h2d:
                raise UserError(f"--overlap-cpu-optimizer-d2h-h2d: needs {flag}")
            if fraction != 1.0:
                raise UserError(f"--optimizer-offload-fraction: needs {flag}")
        elif not self.use_precision_aware_optimizer:
            raise UserError(f"{flag}: needs --use-precision-aware-optimizer, whose code Megatron uses for it")
        elif fraction != 1.0:
            raise UserError(
                f"--optimizer-offload-fraction {fraction}: after a resume Megatron would correct Adam's bias in every "
                "step of the part on the GPU as in the first one; leave it at 1"
            )
        elif (self.exp_avg_dtype, self.exp_avg_sq_dtype) != ("fp32", "fp32"):
            raise UserError(f"{flag}: moments on the host are fp32; leave --exp-avg-dtype and --exp-avg-sq-dtype out")

    @property
    def gradients_in_fp32(self) -> bool:
        """Whether gradients are added up in fp32."""
        return self.main_grads_dtype == "fp32"

    def optimizer_fields(self) -> dict[str, Any]:
        """Fields of Megatron's OptimizerConfig."""
        import torch

        if not self.use_precision_aware_optimizer:
            return {}
        return {
            "use_precision_aware_optimizer": True,
            **{
                name: getattr(torch, TORCH_NAMES[getattr(self, name)])
                for name in ("exp_avg_dtype", "exp_avg_sq_dtype", "main_grads_dtype", "main_params_dtype")
            },
            "optimizer_cpu_offload": self.optimizer_cpu_offload,
            "optimizer_offload_fraction": self.optimizer_offload_fraction,
            "overlap_cpu_optimizer_d2h_h2d": self.overlap_cpu_optimizer_d2h_h2d,
        }


def check_optimizer_states(options: OptimizerStateOptions, dtype: "torch.dtype", platform: Platform) -> None:
    """Check that platform and dtype have what the flags need.

    Raises:
        UserError: naming the flag.
    """
    import torch

    if not options.use_precision_aware_optimizer:
        return
    flag = "--use-precision-aware-optimizer"
    if not platform.transformer_engine:
        raise UserError(
            f"{flag}: needs Transformer Engine's FusedAdam on GPUs, and this run is on --platform {platform.name}, "
            "whose optimizer is torch's; leave it out"
        )
    if dtype != torch.bfloat16:
        raise UserError(f"{flag}: needs bf16, since fp32 weights are the optimizer's own; add --bf16 or leave it out")
