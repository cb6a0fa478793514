"""What a rank sends, by kind of parallelism, and what a pair of split matrices sends.

Sent bytes are those a rank hands to others: of a gather over g ranks its own piece g - 1 times, of a reduce-scatter all
pieces but its own, of an all-reduce both. NCCL's rings send as many.
"""

import dataclasses

from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.activations import BLOCK
from megatron_moe_lpr.planning.sizes import FP32, RunSizes


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step."""

    data: float = 0.0
    """Gradients and parameters over the data-parallel ranks, without the experts'."""
    expert_data: float = 0.0
    """The experts', over the ranks that hold the same ones."""
    tensor: float = 0.0
    """Activations and their gradients over the TP ranks, the original expert's among them; gradients of routers."""
    expert: float = 0.0
    """Tokens and their weights over the EP ranks: dispatch and combine, forward and backward."""
    expert_tensor: float = 0.0
    """Tokens over the ranks that share an expert's matrices."""
    pipeline: float = 0.0
    """Activations and their gradients between stages; gradients of tied embeddings."""
    metadata: float = 0.0
    """Numbers of tokens: over the EP ranks what will come, over the TP ranks what router and original expert had."""

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def total(self) -> float:
        """All kinds."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Habits:
    """What else than shapes and layout decides: the platforms differ in it."""

    gradient_of_embedding: bool = True
    """Input gradients are computed down to the embedding's output, although nothing trains there. On GPUs always; on
    CPUs with recompute or PP, else only down to the lowest layer that trains something (model/gpt.py)."""
    overlap_param_gather: bool = True
    """Parameters are gathered once. Otherwise Megatron gathers all of them after each of its optimizers, that of the
    experts and that of the rest (distrib_optimizer.py `step_with_ready_grads`)."""


GPU, CPU = Habits(), Habits(gradient_of_embedding=False, overlap_param_gather=False)


@dataclasses.dataclass(frozen=True)
class Passes:
    """How often a layer's parts are computed for a micro-batch."""

    attention: int = 1
    ffn: int = 1
    backward: bool = True
    """Gradients reach the input of attention and FFN; False: in a MoE layer those of routers and experts alone."""


def tensor_unit(layout: ParallelLayout, sizes: RunSizes, width: float) -> float:
    """A gather or a reduce-scatter of a micro-batch over the TP ranks. An all-reduce is two of them."""
    tp = layout.tensor_model_parallel_size
    return sizes.micro_batch_size * sizes.seq_length / tp * width * (tp - 1)


def tensor_pair(layout: ParallelLayout, sizes: RunSizes, forward: int, backward: bool, trains: bool) -> float:
    """Bytes for each value of the input of a matrix split by columns and one split by rows after it.

    Under SP the input is gathered before and the output scattered after, and so their gradients; for weight gradients
    the input is gathered again. Transformer Engine gathers in FP8, blockwise the gradient for each product anew.
    """
    scattered = gathered = float(sizes.element_bytes)
    if not layout.uses_sequence_parallel:
        return 2 * scattered * (forward + backward)
    again = 1 if trains else 0
    if sizes.precision == "fp8":
        blockwise = sizes.fp8_recipe == "blockwise"
        gathered = 1 + FP32 / BLOCK if blockwise else 1.0
        again *= 2 if blockwise else 1
    return forward * (gathered + scattered) + backward * (gathered * (1 + again) + scattered)
