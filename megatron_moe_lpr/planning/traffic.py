"""What a rank sends, by kind of parallelism, and what a pair of split matrices sends.

Sent bytes are those that a rank hands to others: of a gather over g ranks its own piece g - 1 times, of a
reduce-scatter all pieces but its own, of an all-reduce both. NCCL's rings send as many.
"""

import dataclasses

from megatron_moe_lpr.planning.planned_run import PlannedRun
from megatron_moe_lpr.planning.sizes import FP8_BLOCK, FP32


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step."""

    data: float = 0.0
    """DP: gradients and parameters, without the experts'."""
    expert_data: float = 0.0
    """Gradients and parameters of the new experts, over the ranks that hold the same ones."""
    tensor: float = 0.0
    """TP: activations and their gradients, the original expert's included; gradients of routers."""
    expert: float = 0.0
    """EP: tokens and their weights, dispatch and combine, forward and backward."""
    expert_tensor: float = 0.0
    """Tokens over the ranks that share an expert's matrices."""
    pipeline: float = 0.0
    """PP: activations and their gradients; gradients of tied embeddings."""
    metadata: float = 0.0
    """Token counts exchanged by the dispatcher (EP) and by router and original expert (TP)."""
    context: float = 0.0
    """CP: keys and values, and their gradients."""

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def total(self) -> float:
        """Bytes of all kinds."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class PlatformBehaviour:
    """Platform differences that change what is sent."""

    gradient_of_embedding: bool = True
    """Input gradients are computed down to the embedding's output, although nothing trains there. With Transformer
    Engine always; with local layers with recompute or PP, else only down to the lowest layer that trains something
    (model/gpt.py)."""
    overlap_param_gather: bool = True
    """Parameters are gathered once. Otherwise Megatron gathers all of them after each of its optimizers, that of the
    experts and that of the rest (distrib_optimizer.py `step_with_ready_grads`)."""
    local_attention: bool = False
    """CP ranks exchange keys and values as local layers do."""


GPU = PlatformBehaviour()
CPU = PlatformBehaviour(gradient_of_embedding=False, overlap_param_gather=False, local_attention=True)
LOCAL_GPU = PlatformBehaviour(gradient_of_embedding=False, local_attention=True)
"""GPUs without Transformer Engine."""


@dataclasses.dataclass(frozen=True)
class Passes:
    """How often the parts of a layer are computed for a micro-batch."""

    attention: int = 1
    """Forward passes of attention."""
    ffn: int = 1
    """Forward passes of the FFN, dense or MoE."""
    backward: bool = True
    """Gradients reach the input of attention and FFN; False: in a MoE layer only those of routers and experts exist."""


def tensor_unit(run: PlannedRun, width: float) -> float:
    """Bytes of a gather or a reduce-scatter of a micro-batch over the TP ranks, B S / TP * width * (TP - 1); an
    all-reduce is two of them. `width` is in bytes per token."""
    return run.rank_tokens * width * (run.layout.tensor_model_parallel_size - 1)


def tensor_pair(run: PlannedRun, forward: int, backward: bool, trains: bool) -> float:
    """Bytes for each value of the input of a matrix split by columns and one split by rows after it.

    Under SP the input is gathered before and the output scattered after, and so are their gradients; for weight
    gradients the input is gathered again. Transformer Engine gathers in FP8, and with blockwise scales it gathers the
    gradient once for each of its two products.

    Args:
        forward: forward passes, recomputation included.
        backward: the gradient of the input is computed.
        trains: the gradient of the weights is computed.
    """
    scattered = gathered = float(run.sizes.element_bytes)
    if not run.layout.uses_sequence_parallel:
        return 2 * scattered * (forward + backward)
    gathers_again = 1 if trains else 0
    if run.sizes.precision == "fp8":
        blockwise = run.sizes.fp8_recipe == "blockwise"
        gathered = 1 + FP32 / FP8_BLOCK if blockwise else 1.0
        gathers_again *= 2 if blockwise else 1
    return forward * (gathered + scattered) + backward * (gathered * (1 + gathers_again) + scattered)
