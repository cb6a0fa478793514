"""Checks of a stage and its flags against the model alone, which a run and its plan share."""

from megatron_moe_lpr.engine.options import OptimizerOptions
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.configuration.fp8 import FP8Options
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.training.configuration.stages import Stage


def check_sequence_length(length: int, architecture: Architecture) -> None:
    """Check --seq-length. Raises UserError: the model has fewer positions."""
    longest = architecture.max_position_embeddings
    if length > longest:
        raise UserError(f"--seq-length {length}: the model has only {longest} positions")


def check_fp8_param_gather(
    options: FP8Options, stage: Stage, has_expansions: bool, optimizer: OptimizerOptions
) -> None:
    """Check that --fp8-param-gather leaves no frozen weight in FP8, which would round it, and that the optimizer can
    update weights in FP8.

    Args:
        has_expansions: whether the model has frozen experts in the same modules as new ones: those of a mixture base or
            of earlier expansions.

    Raises:
        UserError: naming the flag or stage that excludes it.
    """
    if not options.fp8_param_gather:
        return
    if ParameterKind.NEW_EXPERTS not in stage.trains:
        raise UserError(
            f"--fp8-param-gather: stage {stage.name} keeps the new experts frozen, to the bit; leave it out"
        )
    if has_expansions:
        raise UserError(
            "--fp8-param-gather: would round the frozen experts, of a mixture base or of earlier expansions; leave it "
            "out"
        )
    if optimizer.states.optimizer_cpu_offload:
        raise UserError("--optimizer-cpu-offload: the host has no FP8 weights; leave --fp8-param-gather out")
    if not optimizer.use_distributed_optimizer:
        raise UserError("--fp8-param-gather needs --use-distributed-optimizer")
