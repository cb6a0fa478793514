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


# Counted on the emulated device in bf16, where tests/gpu/test_planned_launches.py compares them, in a step that does
# not log its routing. In fp32, without fused attention, there are some 35 more a layer. Collectives are left out: they
# are the estimate of communication.
ATTENTION = Launches(11, 13)
"""With its norm, and both residual additions of the layer."""
DENSE_FFN = Launches(4, 5)
MOE_NORM = Launches(1, 2)
MOE = Launches(14, 19)
"""Router with the gradients of its losses, dispatcher, original expert. Backward includes each expert's share of the
tokens, which is computed once under recomputation too. A stage without the load balancing loss launches one less."""
NEW_EXPERT = Launches(2, 2)
"""Its two products; every expert is taken to have rows."""
EXPERT_PARALLEL = Launches(6, 2)
"""In each MoE layer, with EP over 1."""
TENSOR_PARALLEL_ATTENTION, TENSOR_PARALLEL_FFN, TENSOR_PARALLEL_MOE = Launches(-1, 0), Launches(0, 0), Launches(2, 1)
"""More of each with TP over 1."""
FP8_ATTENTION, FP8_DENSE_FFN, FP8_MOE = Launches(1, 2), Launches(1, 2), Launches(7, 8)
"""To round the operands of the products, the norms' outputs apart; with MoE rows are padded too. The recipes differ by
one a layer."""
DELAYED_STATES = {("moe", True): 36, ("mlp", False): 20, ("full", True): 66, ("full", False): 46}
"""By recompute and whether the layer has experts: with delayed scaling Transformer Engine puts the states of each
recomputed module aside and back, 8 copies a module, and updates scales 2 to 5 times more (quantization.py
`copy_forward_fp8_meta_tensors_for_recompute`, `reduce_and_update_fp8_tensors`). That of mlp is derived, not counted."""
EVERY_RANK, TAGS = 4, 16
"""Of a micro-batch; the tags of its tokens and the scale of its losses, which a model with experts needs."""
FIRST_RANK, LAST_RANK = 1, 32
"""The embedding; final norm, output matrix and loss."""
SPLIT_VOCABULARY = 9, 1
"""More of both with TP over 1."""
TRAINED_VOCABULARY, TRAINED_SPLIT_EMBEDDING = 2, 2
"""The gradient of the embedding or of the output matrix, and its addition to the buffer; more with TP over 1."""


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
    is_split = run.layout.tensor_model_parallel_size > 1
    outside, ffn = [ATTENTION, *[TENSOR_PARALLEL_ATTENTION] * is_split], [DENSE_FFN, *[TENSOR_PARALLEL_FFN] * is_split]
    if layer.is_moe:
        ranks = run.layout.expert_model_parallel_size
        outside.append(MOE_NORM)
        ffn = [MOE, *[NEW_EXPERT] * (layer.spread_experts // ranks), *[DENSE_FFN] * (layer.shared_expert_size > 0)]
        ffn += [*[EXPERT_PARALLEL] * (ranks > 1), *[TENSOR_PARALLEL_MOE] * is_split]
    if run.sizes.precision == "fp8":
        outside.append(FP8_ATTENTION)
        ffn.append(FP8_MOE if layer.is_moe else FP8_DENSE_FFN)
    total = sum(part.total for part in (*outside, *ffn))
    if recompute == "full":
        total += sum(part.forward for part in outside)
    if recompute in ("full", "moe" if layer.is_moe else "mlp"):
        total += sum(part.forward for part in ffn)
    if run.sizes.precision == "fp8" and run.sizes.fp8_recipe == "delayed":
        total += DELAYED_STATES.get((recompute, layer.is_moe), 0)
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
        if parameter.kind in trains and not (parameter.kind.is_router or parameter.kind is ParameterKind.EMBEDDING):
            ranks = run.layout.expert_model_parallel_size if parameter.kind.is_expert_parallel else 1
            total += parameter.copies // ranks
    if ParameterKind.EMBEDDING in trains:
        is_first, is_split = pipeline_rank == 0, run.layout.tensor_model_parallel_size > 1
        total += TRAINED_VOCABULARY * (is_first + run.is_last(pipeline_rank))
        total += TRAINED_SPLIT_EMBEDDING * (is_first and is_split)
    return total
