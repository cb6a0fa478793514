"""How many parameters a model has, and how many of them each rank of a layout holds."""

from collections import Counter
from collections.abc import Collection

from megatron_moe_lpr.model.build import padded_vocab_size
from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.parallel.layout import ParallelLayout

ParameterCounts = Counter[ParameterKind]


def model_parameters(shape: ModelShape) -> ParameterCounts:
    """Parameters of the whole model, without the rows that only pad the vocabulary."""
    architecture, one_rank = shape.architecture, ParallelLayout()
    counts = stage_parameters(shape, one_rank, 0)
    matrices = 1 if architecture.tied_embeddings else 2
    counts[ParameterKind.EMBEDDING] = matrices * architecture.vocab_size * architecture.hidden_size
    return counts


def active_parameters(shape: ModelShape) -> int:
    """Parameters that one token passes: of each layer's experts its top k."""
    total = 0
    for kind, count in model_parameters(shape).items():
        if kind not in (ParameterKind.ORIGINAL_EXPERT, ParameterKind.NEW_EXPERTS, ParameterKind.EARLIER_EXPERTS):
            total += count
    return total + shape.num_moe_layers * shape.top_k * _ffn(shape)


def trainable(counts: ParameterCounts, trains: Collection[ParameterKind]) -> int:
    """Those of the parameters that a stage trains."""
    return sum(count for kind, count in counts.items() if kind in trains)


def stage_parameters(shape: ModelShape, layout: ParallelLayout, stage: int) -> ParameterCounts:
    """Parameters of one rank of a pipeline stage, padding included."""
    counts: ParameterCounts = Counter()
    for layer in stage_layers(shape, layout, stage):
        of_layer = layer_parameters(shape, shape.experts_per_layer[layer], layout)
        if layer in shape.inserted_blocks:
            of_layer = Counter({ParameterKind.INSERTED_BLOCKS: sum(of_layer.values())})
        counts.update(of_layer)
        earlier = shape.earlier_experts(layer) * _ffn(shape)
        earlier //= layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
        counts[ParameterKind.NEW_EXPERTS] -= earlier
        counts[ParameterKind.EARLIER_EXPERTS] += earlier
    counts[ParameterKind.EMBEDDING] += vocabulary_matrices(shape, layout, stage) * vocabulary_matrix(shape, layout)
    if stage == layout.pipeline_model_parallel_size - 1:
        counts[ParameterKind.NORM] += shape.architecture.hidden_size
    return counts


def stage_layers(shape: ModelShape, layout: ParallelLayout, stage: int) -> list[int]:
    """The layers of a pipeline stage: one run of them, or with virtual stages several."""
    stages, chunks = layout.pipeline_model_parallel_size, layout.num_virtual_stages_per_pipeline_rank
    size = shape.architecture.num_layers // (stages * chunks)
    starts = [(chunk * stages + stage) * size for chunk in range(chunks)]
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
    counts: ParameterCounts = Counter({ParameterKind.ATTENTION: attention // tp, ParameterKind.NORM: norms})
    if experts == 1:
        counts[ParameterKind.DENSE_FFN] = _ffn(shape) // tp
        return counts
    counts[ParameterKind.ROUTER] = experts * hidden
    counts[ParameterKind.ORIGINAL_EXPERT] = _ffn(shape) // tp
    expert_ranks = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    counts[ParameterKind.NEW_EXPERTS] = (experts - 1) * _ffn(shape) // expert_ranks
    return counts


def vocabulary_matrix(shape: ModelShape, layout: ParallelLayout) -> int:
    """Elements of a rank's part of the embedding or the output matrix."""
    tp = layout.tensor_model_parallel_size
    return padded_vocab_size(shape.architecture.vocab_size, tp) // tp * shape.architecture.hidden_size


def vocabulary_matrices(shape: ModelShape, layout: ParallelLayout, stage: int) -> int:
    """Vocabulary matrices of a pipeline stage; tied ones are one matrix on one stage, a copy each on two."""
    stages = layout.pipeline_model_parallel_size
    has_output = stage == stages - 1 and (stages > 1 or not shape.architecture.tied_embeddings)
    return int(stage == 0) + int(has_output)


def _ffn(shape: ModelShape) -> int:
    return 3 * shape.architecture.hidden_size * shape.architecture.ffn_hidden_size
