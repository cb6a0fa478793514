"""A run on paper, and one of its layers: the context of every formula of this package."""

import dataclasses
from typing import Literal

from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.configuration.parameter_kinds import VOCABULARY, ParameterKind, trained_in_layer
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.planning.parameters import pipeline_rank_layers
from megatron_moe_lpr.planning.sizes import RunSizes

Recompute = Literal["none", "core_attn", "layernorm", "moe_act", "mlp", "moe", "full"]
"""none: every activation is kept; full: whole layers are recomputed (`--recompute-granularity full`); the others: one
module of `--recompute-granularity selective --recompute-modules ...`."""


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """Model, layout, batch and precision of a run, and what its backward passes recompute."""

    shape: ModelShape
    layout: ParallelLayout
    sizes: RunSizes
    recompute: Recompute = "none"

    @property
    def own_length(self) -> int:
        """Tokens of a sequence that a CP rank computes, S / CP."""
        return self.sizes.seq_length // self.layout.context_parallel_size

    @property
    def rank_tokens(self) -> float:
        """A CP rank's tokens of a micro-batch over the TP ranks, B S / (CP TP): a rank's part under SP, its share of
        split features."""
        return self.sizes.micro_batch_size * self.own_length / self.layout.tensor_model_parallel_size

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the residual stream of one token."""
        return self.shape.architecture.hidden_size * self.sizes.element_bytes

    @property
    def trained_vocabulary(self) -> frozenset[ParameterKind]:
        """Kinds of rows of the embedding and of the output layer that the model has and that train; empty: none."""
        kinds = {parameter.kind for parameter in self.shape.parameters} & VOCABULARY
        return frozenset(kinds & self.sizes.trains)

    @property
    def num_microbatches(self) -> int:
        """Micro-batches that a rank accumulates in one step."""
        return self.sizes.num_microbatches(self.layout)

    @property
    def pipeline_ranks(self) -> range:
        """All ranks of a pipeline."""
        return range(self.layout.pipeline_model_parallel_size)

    def is_last(self, pipeline_rank: int) -> bool:
        """The pipeline rank has the output matrix and the loss."""
        return pipeline_rank == self.layout.pipeline_model_parallel_size - 1

    def layers(self, pipeline_rank: int) -> "list[PlannedLayer]":
        """Layers of a pipeline rank."""
        return [PlannedLayer(self, layer) for layer in pipeline_rank_layers(self.shape, self.layout, pipeline_rank)]


@dataclasses.dataclass(frozen=True)
class PlannedLayer:
    """One transformer layer of a run."""

    run: PlannedRun
    index: int

    @property
    def architecture(self) -> Architecture:
        """Dimensions, the same in all layers."""
        return self.run.shape.architecture

    @property
    def num_experts(self) -> int:
        """E, the original ones included; 1: a dense layer."""
        return self.run.shape.experts_per_layer[self.index]

    @property
    def is_moe(self) -> bool:
        """The layer has a router."""
        return self.num_experts > 1

    @property
    def has_new_experts(self) -> bool:
        """The layer has experts that the base model has not: of a mixture base not all layers with a router do."""
        return self.num_experts > self.run.shape.base_experts(self.index)

    @property
    def newest_experts(self) -> int:
        """New experts of the latest expansion; those of earlier ones are frozen."""
        return self.run.shape.expert_groups(self.index)[-1]

    @property
    def has_expert_apart(self) -> bool:
        """A single original expert is on every EP rank; those of a mixture base are spread like the new ones."""
        return self.is_moe and self.run.shape.base_experts(self.index) == 1

    @property
    def spread_experts(self) -> int:
        """Experts that the EP ranks share: new ones, and those of a mixture base."""
        return self.num_experts - self.has_expert_apart

    @property
    def shared_expert_size(self) -> int:
        """Width of the FFN that every token passes beside the experts of a mixture base; 0: none."""
        mixture = self.architecture.mixture
        return mixture.shared_expert_size if mixture and self.is_moe else 0

    @property
    def trains(self) -> frozenset[ParameterKind]:
        """Kinds of parameters that train in this layer."""
        return trained_in_layer(self.run.sizes.trains, self.index in self.run.shape.inserted_blocks)

    @property
    def has_trained_weight_below(self) -> bool:
        """A weight that comes before this layer's FFN trains, or the run needs gradients from the embedding's output on
        in any case: so attention has a backward pass (`model/gpt.py`, of local layers)."""
        run, shape = self.run, self.run.shape
        everywhere = run.recompute != "none" or run.layout.pipeline_model_parallel_size > 1
        # In a layer with new experts the lowest weight that trains is the router, so that the layer's own attention
        # needs no gradient; an inserted block begins with a norm, which trains.
        router = any(PlannedLayer(run, layer).has_new_experts for layer in range(self.index))
        inserts = ParameterKind.INSERTED_BLOCKS in run.sizes.trains
        inserted = inserts and any(block <= self.index for block in shape.inserted_blocks)
        return everywhere or bool(run.trained_vocabulary) or router or inserted
