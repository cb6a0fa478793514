"""What an allocation of experts saves against the same number in every layer."""

import dataclasses

from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.parameter_counts import count_parameters
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.memory import GIB, gradient_bytes, optimizer_bytes, weight_bytes
from megatron_moe_lpr.planning.sizes import RunSizes


def saving_against_uniform(shape: ModelShape, sizes: RunSizes, num_experts: int) -> str:
    """Two lines: new experts and parameters; bytes of one copy of the model."""
    uniform = dataclasses.replace(shape, experts_per_layer=(num_experts,) * len(shape.experts_per_layer))
    new, more = (sum(one.experts_per_layer) - len(one.experts_per_layer) for one in (shape, uniform))
    ours, theirs = (count_parameters(one.parameters) for one in (shape, uniform))
    memory, uniform_memory = (_model_bytes(one, sizes) / GIB for one in (shape, uniform))
    return (
        f"New experts: {new} instead of {more} ({num_experts} experts in every layer): {_change(new, more)}; "
        f"parameters {sum(ours.values()):,} instead of {sum(theirs.values()):,}: "
        f"{_change(sum(ours.values()), sum(theirs.values()))}\n"
        f"Weights, gradients and optimizer of this stage, one copy over all ranks: {memory:,.1f} GiB instead of "
        f"{uniform_memory:,.1f}: {_change(memory, uniform_memory)}"
    )


def _model_bytes(shape: ModelShape, sizes: RunSizes) -> float:
    counts = count_parameters(shape.parameters)
    one = dataclasses.replace(sizes, distributed_optimizer=False)
    return weight_bytes(counts, one) + gradient_bytes(counts, one) + optimizer_bytes(counts, ParallelLayout(), one)


def _change(value: float, reference: float) -> str:
    return f"{value / reference - 1:+.0%}" if reference else "the same"
