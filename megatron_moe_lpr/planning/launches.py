"""Launches of a micro-batch: what the host must give a GPU to do, one after the other, and how long that takes.

A GPU computes no faster than the host launches. On small micro-batches the host may set the pace.
"""

import dataclasses

from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.planning.parameters import held_parameters
from megatron_moe_lpr.planning.planned_run import PlannedLayer, PlannedRun

LAUNCH_SECONDS = 4e-6
"""Seconds of the host for a launch: an assumption, about what profiles of PyTorch show from one launch to the next. It
was never measured here, and the Python of Megatron's and Transformer Engine's layers may make it several times as
long."""


@dataclasses.dataclass(frozen=True)
class Launches:
    """Of a forward and of a backward pass, without those for weight gradients."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Of both passes."""
        return self.forward + self.backward


# Counted on the emulated device in bf16, where tests/gpu/test_planned_launches.py compares them. In fp32, without fused
# attention, there are some 35 more a layer. Collectives are left out: they are the estimate of communication.
ATTENTION = Launches(12, 10)
DENSE_FFN = Launches(4, 5)
MOE_NORM = Launches(1, 2)
MOE = Launches(34, 103)
"""Router with its losses and statistics, dispatcher, original expert."""
NEW_EXPERT = Launches(2, 2)
"""Its two products; every expert is taken to have rows."""
EXPERT_PARALLEL = Launches(6, 0)
"""In each MoE layer, with EP over 1."""
TENSOR_PARALLEL = Launches(1, 1)
"""In each layer, with TP over 1."""
FP8 = 18
"""To round the operands of a layer's products and to pad rows; the recipes differ by one."""
EVERY_RANK, TAGS = 4, 13
"""Of a micro-batch; the tags of its tokens, which a model with experts needs."""
FIRST_RANK, LAST_RANK = 1, 32
"""The embedding; final norm, output matrix and loss."""
SPLIT_VOCABULARY = 8, 6
"""More of both with TP over 1."""
TRAINED_VOCABULARY = 2
"""The gradient of the embedding or of the output matrix, and its addition to the buffer."""


def launches_per_micro_batch(run: PlannedRun, pipeline_rank: int) -> int:
    """Launches of one micro-batch on a rank, recomputation included."""
    layers = sum(_layer_launches(layer) for layer in run.layers(pipeline_rank))
    return layers + _outside_layers(run, pipeline_rank) + _for_weight_gradients(run, pipeline_rank)


def launching_seconds(run: PlannedRun) -> float:
    """Seconds that the host of the pipeline rank with most launches needs for those of a step's micro-batches."""
    most = max(launches_per_micro_batch(run, pipeline_rank) for pipeline_rank in run.pipeline_ranks)
    return most * run.num_microbatches * LAUNCH_SECONDS


def _layer_launches(layer: PlannedLayer) -> int:
    run, recompute = layer.run, layer.run.recompute
    outside, ffn = [ATTENTION], [DENSE_FFN]
    if layer.is_moe:
        ranks = run.layout.expert_model_parallel_size
        outside.append(MOE_NORM)
        ffn = [MOE, *[NEW_EXPERT] * ((layer.num_experts - 1) // ranks), *[EXPERT_PARALLEL] * (ranks > 1)]
    if run.layout.tensor_model_parallel_size > 1:
        outside.append(TENSOR_PARALLEL)
    total = sum(part.total for part in (*outside, *ffn)) + FP8 * (run.sizes.precision == "fp8")
    if recompute == "full":
        total += sum(part.forward for part in outside)
    if recompute in ("full", "moe" if layer.is_moe else "mlp"):
        total += sum(part.forward for part in ffn)
    return total


def _outside_layers(run: PlannedRun, pipeline_rank: int) -> int:
    more = SPLIT_VOCABULARY if run.layout.tensor_model_parallel_size > 1 else (0, 0)
    total = EVERY_RANK + TAGS * (run.shape.num_moe_layers > 0)
    total += (FIRST_RANK + more[0]) * (pipeline_rank == 0)
    return total + (LAST_RANK + more[1]) * run.is_last(pipeline_rank)


def _for_weight_gradients(run: PlannedRun, pipeline_rank: int) -> int:
    """A product for each matrix of a layer, which adds its gradient to the buffer; the addition of each norm's and each
    bias's gradient, which come with other kernels. Those of routers are counted with their layer."""
    total, trains = 0, run.sizes.trains
    for parameter in held_parameters(run.shape, run.layout, pipeline_rank):
        if parameter.kind in trains and parameter.kind not in (ParameterKind.ROUTER, ParameterKind.EMBEDDING):
            ranks = run.layout.expert_model_parallel_size if parameter.kind.is_expert_parallel else 1
            total += parameter.copies // ranks
    if ParameterKind.EMBEDDING in trains:
        total += TRAINED_VOCABULARY * ((pipeline_rank == 0) + run.is_last(pipeline_rank))
    return total
