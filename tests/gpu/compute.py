"""One step on either platform: logits, loss and all gradients to a file. Started by the GPU tests through torchrun.

torchrun ... -m tests.gpu.compute --load DIR --out FILE --platform cuda --bf16 --fp8-format hybrid
"""

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

from megatron_moe_lpr.checkpoint.loading import LoadedModel, load_model
from megatron_moe_lpr.errors import run_command
from megatron_moe_lpr.evaluation.global_batch import run_schedule, to_device
from megatron_moe_lpr.model.forward import compute_logits
from megatron_moe_lpr.model.fp8 import FP8Options
from megatron_moe_lpr.parallel.groups import destroy_parallel, initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import PlatformName, select_platform
from megatron_moe_lpr.training.config import OptimizerOptions, PrecisionOptions
from megatron_moe_lpr.training.guards import GradientWatch
from megatron_moe_lpr.training.optimizer import build_optimizer, wrap_data_parallel
from megatron_moe_lpr.training.stages import STAGES, StageName, freeze
from tests.training.one_step import ORIGINAL_TABLE, VOCABULARY, gather_gradients, micro_batches, samples


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to compute, and how."""

    load: Path
    out: Path
    platform: PlatformName = "cuda"
    stage: StageName = "1"
    precision: tyro.conf.OmitArgPrefixes[PrecisionOptions] = dataclasses.field(default_factory=PrecisionOptions)
    fp8: tyro.conf.OmitArgPrefixes[FP8Options] = dataclasses.field(default_factory=FP8Options)
    layout: tyro.conf.OmitArgPrefixes[ParallelLayout] = dataclasses.field(default_factory=ParallelLayout)


def main() -> None:
    """Command line."""
    arguments = tyro.cli(Arguments)
    platform = select_platform(arguments.platform, arguments.layout.tensor_model_parallel_size)
    initialize_parallel(platform, arguments.layout)
    model = load_model(
        arguments.load,
        arguments.layout,
        platform,
        arguments.precision.compute_options("float32", arguments.fp8),
        load_balancing_coeff=0.3,
        lpr_loss_coeff=0.5,
        calculate_per_token_loss=True,
    )
    with torch.no_grad():
        logits = compute_logits(model.chunks, model.config, samples()["tokens"].to(platform.device), VOCABULARY)
    loss, gradients = _step(model, arguments.stage, platform)
    if dist.get_rank() == 0:
        torch.save({"logits": logits.cpu(), "loss": torch.tensor(loss), "gradients": gradients}, arguments.out)
    destroy_parallel()


def _step(model: LoadedModel, stage: StageName, platform) -> tuple[float, dict[str, torch.Tensor]]:
    freeze(model.chunks, STAGES[stage])
    options = OptimizerOptions()
    chunks = wrap_data_parallel(model.chunks, model.config, options)
    build_optimizer(chunks, model.config, options, platform)
    watch = GradientWatch(chunks)
    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    batches = [to_device(batch, platform.device) for batch in micro_batches(2)]
    sums = run_schedule(chunks, model.config, batches, ORIGINAL_TABLE.to(platform.device))
    watch.check()
    return sums.mean, {key: gradient.cpu() for key, gradient in gather_gradients(chunks).items()}


if __name__ == "__main__":
    run_command(main)
