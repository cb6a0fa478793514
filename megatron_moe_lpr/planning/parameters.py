"""How many parameters a model has, and how many of them each rank of a layout holds."""

from collections import Counter
from collections.abc import Collection

from megatron_moe_lpr.model.build import padded_vocab_size
from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.parameter_kinds import ParameterKind
from megatron_moe_lpr.parallel.layout import ParallelLayout

ParameterCounts = Counter[ParameterKind]


def model_parameters(shape: ModelShape) -> ParameterCounts:
    """Parameters of the whole model, without the rows that only pad the vocabulary."""
    architecture, one_rank = shape.architecture, ParallelLayout()
    counts = rank_parameters(shape, one_rank, 0)
    matrices = 1 if architecture.tied_embeddings else 2
    counts["embedding"] = matrices * architecture.vocab_size * architecture.hidden_size
    return counts


def active_parameters(shape: ModelShape) -> int:
    """Parameters that one token passes: of each layer's experts its top k."""
    total = 0
    for kind, count in model_parameters(shape).items():
        if kind not in ("original expert", "new experts", "earlier experts"):
            total += count
    return total + shape.num_moe_layers * shape.top_k * _ffn(shape)


def trainable(counts: ParameterCounts, trains: Collection[ParameterKind]) -> int:
    """Number of the parameters that train."""
    return sum(count for kind, count in counts.items() if kind in trains)


def rank_parameters(shape: ModelShape, layout: ParallelLayout, pipeline_rank: int) -> ParameterCounts:
    """Parameters of one rank, the rows that pad the vocabulary included."""
    counts: ParameterCounts = Counter()
    for layer in pipeline_rank_layers(shape, layout, pipeline_rank):
        in_layer = layer_parameters(shape, shape.experts_per_layer[layer], layout)
        if layer in shape.inserted_blocks:
            in_layer = Counter({"inserted blocks": sum(in_layer.values())})
        counts.update(in_layer)
        earlier = shape.earlier_experts(layer) * _ffn(shape)
        earlier //= layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
        counts["new experts"] -= earlier
        counts["earlier experts"] += earlier
    counts["embedding"] += _vocabulary_matrices(shape, layout, pipeline_rank) * vocabulary_matrix(shape, layout)
    if pipeline_rank == layout.pipeline_model_parallel_size - 1:
        counts["norm"] += shape.architecture.hidden_size
    return counts


def pipeline_rank_layers(shape: ModelShape, layout: ParallelLayout, pipeline_rank: int) -> list[int]:
    """Layers of a pipeline rank: one run of them, or with the interleaved schedule one run for each model chunk."""
    ranks, chunks = layout.pipeline_model_parallel_size, layout.num_virtual_stages_per_pipeline_rank
    size = shape.architecture.num_layers // (ranks * chunks)
    starts = [(chunk * ranks + pipeline_rank) * size for chunk in range(chunks)]
    return [start + offset for start in starts for offset in range(size)]


def layer_parameters(shape: ModelShape, experts: int, layout: ParallelLayout) -> ParameterCounts:
    """Parameters of one rank in one layer."""
    architecture, tp = shape.architecture, layout.tensor_model_parallel_size
    hidden, head = architecture.hidden_size, architecture.head_dim
    query, key_value = architecture.num_attention_heads * head, 2 * architecture.num_query_groups * head
    attention = hidden * (2 * query + key_value)
    if architecture.family.qkv_bias:
        attention += query + key_value
    norms = 2 * hidden + (2 * head if architecture.family.qk_norm else 0)
    counts: ParameterCounts = Counter({"attention": attention // tp, "norm": norms})
    if experts == 1:
        counts["dense FFN"] = _ffn(shape) // tp
        return counts
    counts["router"] = experts * hidden
    counts["original expert"] = _ffn(shape) // tp
    expert_ranks = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    counts["new experts"] = (experts - 1) * _ffn(shape) // expert_ranks
    return counts


def vocabulary_matrix(shape: ModelShape, layout: ParallelLayout) -> int:
    """Elements of a rank's part of the embedding or the output matrix."""
    tp = layout.tensor_model_parallel_size
    return padded_vocab_size(shape.architecture.vocab_size, tp) // tp * shape.architecture.hidden_size


def _vocabulary_matrices(shape: ModelShape, layout: ParallelLayout, pipeline_rank: int) -> int:
    """Vocabulary matrices of a pipeline rank; tied ones are one matrix on one rank, a copy each on two."""
    ranks = layout.pipeline_model_parallel_size
    has_output = pipeline_rank == ranks - 1 and (ranks > 1 or not shape.architecture.tied_embeddings)
    return int(pipeline_rank == 0) + int(has_output)


def _ffn(shape: ModelShape) -> int:
    return 3 * shape.architecture.hidden_size * shape.architecture.ffn_hidden_size
