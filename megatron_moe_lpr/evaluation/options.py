"""Options of an evaluation."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from megatron_moe_lpr.data.reading.document_options import DocumentOptions
from megatron_moe_lpr.flag_ranges import PositiveInt
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import PlatformName, TransformerImpl

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """Which checkpoint is evaluated, on which data, and how: flags of `moe-lpr evaluate`."""

    load: Path
    """Checkpoint directory, dense or MoE, or one iteration in it."""
    valid_data_path: list[str]
    """Datasets: prefixes, each evaluated by itself, whole and in order."""
    original_languages: list[str] = dataclasses.field(default_factory=list)
    """Languages that the dense model already knows. Those in the checkpoint's history need not be named."""
    seq_length: PositiveInt = 512
    """Tokens of a sequence, which bounds the context of a prediction."""
    micro_batch_size: PositiveInt = 4
    """Sequences a data-parallel rank computes at once."""
    bf16: bool = False
    """Compute in bfloat16. Default: what the last run computed in, or the checkpoint's own dtype; for a float16 one
    bfloat16. CPUs without bf16 instructions compute in fp32 by default."""
    fp32: bool = False
    """Compute in fp32."""
    fp16: bool = False
    """Not offered: give --bf16 or --fp32."""
    layout: tyro.conf.OmitArgPrefixes[ParallelLayout] = dataclasses.field(default_factory=ParallelLayout)
    documents: tyro.conf.OmitArgPrefixes[DocumentOptions] = dataclasses.field(default_factory=DocumentOptions)
    platform: PlatformName = "auto"
    """Where to run. auto: CUDA if there is a device."""
    transformer_impl: TransformerImpl | None = None
    """Whose layers compute. local: PyTorch's alone. Default: Transformer Engine's on GPUs where it is installed, else
    local."""
    base_checkpoint: Path | None = None
    """For a --load of --save-trainable-only: directory of the checkpoint that its run started from, if it has moved."""
    verify: bool = True
    """Compare the checkpoint's files with their checksums before use."""
    distributed_timeout_minutes: Annotated[PositiveInt, tyro.conf.arg(name="distributed-timeout-minutes")] = 10
    """A collective operation that takes longer ends the command; so does nine tenths of this time without progress."""

    @property
    def dtype(self) -> "torch.dtype | None":
        """Dtype that a flag asks for; None: no flag does. Raises UserError, see `dtype.requested_dtype`."""
        from megatron_moe_lpr.model.configuration.dtype import requested_dtype

        return requested_dtype(self.bf16, self.fp32, self.fp16)
