"""How many parameters each rank of a layout holds."""

import dataclasses
from collections.abc import Collection, Iterator

from megatron_moe_lpr.model.build import padded_new_tokens, padded_vocab_size
from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.configuration.parameter_kinds import VOCABULARY, ParameterKind
from megatron_moe_lpr.model.configuration.parameters import Parameter
from megatron_moe_lpr.model.parameter_counts import ParameterCounts
from megatron_moe_lpr.parallel.layout import ParallelLayout


def trainable(counts: ParameterCounts, trains: Collection[ParameterKind]) -> int:
    """Number of the parameters that train."""
    return sum(count for kind, count in counts.items() if kind in trains)


def rank_parameters(shape: ModelShape, layout: ParallelLayout, pipeline_rank: int) -> ParameterCounts:
    """Number of parameters of each kind on one rank, the rows that pad the vocabulary included."""
    counts = ParameterCounts()
    for parameter in held_parameters(shape, layout, pipeline_rank):
        counts[parameter.kind] += parameter.rank_size(layout)
    return counts


def held_parameters(shape: ModelShape, layout: ParallelLayout, pipeline_rank: int) -> Iterator[Parameter]:
    """Parameters of which a pipeline rank holds a part, vocabulary matrices with the rows that pad them."""
    layers = pipeline_rank_layers(shape, layout, pipeline_rank)
    first, last = pipeline_rank == 0, pipeline_rank == layout.pipeline_model_parallel_size - 1
    for parameter in shape.parameters:
        if parameter.layer is not None:
            on_rank = parameter.layer in layers
        elif parameter.name.startswith("embedding."):
            # The last pipeline rank has a copy of tied embeddings, unless it is the first one too.
            on_rank = first or (last and shape.architecture.tied_embeddings)
        else:
            on_rank = last
        if on_rank and parameter.kind in VOCABULARY:
            rows, hidden = parameter.shape
            pad = padded_vocab_size if parameter.kind is ParameterKind.EMBEDDING else padded_new_tokens
            rows = pad(rows, layout.tensor_model_parallel_size)
            yield dataclasses.replace(parameter, parts=((rows, hidden),))
        elif on_rank:
            yield parameter


def pipeline_rank_layers(shape: ModelShape, layout: ParallelLayout, pipeline_rank: int) -> list[int]:
    """Layers of a pipeline rank: one run of them, or with the interleaved schedule one run for each model chunk."""
    ranks, chunks = layout.pipeline_model_parallel_size, layout.num_virtual_stages_per_pipeline_rank
    size = shape.architecture.num_layers // (ranks * chunks)
    starts = [(chunk * ranks + pipeline_rank) * size for chunk in range(chunks)]
    return [start + offset for start in starts for offset in range(size)]
