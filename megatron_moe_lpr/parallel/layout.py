"""The parallel layout: the number of ranks of each dimension, checked against the model before it is built."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_marks import Free, T
from megatron_moe_lpr.flag_ranges import PositiveInt
from megatron_moe_lpr.parallel.experts import check_expert_parallel

Splits = Annotated[T, Free("who computes which part: rounding alone")]


@dataclasses.dataclass(frozen=True)
class ParallelLayout:
    """Ranks of each parallel dimension. Data parallelism uses the remaining ranks."""

    tensor_model_parallel_size: Splits[PositiveInt] = 1
    """TP: ranks that share each matrix of a layer."""
    pipeline_model_parallel_size: Splits[PositiveInt] = 1
    """PP: ranks that share the layers."""
    num_virtual_stages_per_pipeline_rank: Splits[PositiveInt] = 1
    """Chunks of layers a pipeline rank holds; more than 1 selects the interleaved schedule."""
    expert_model_parallel_size: Splits[PositiveInt] = 1
    """EP: ranks that share the new experts of a layer; must divide their number (all experts less one);
    of a mixture base it must divide its own experts too."""
    expert_tensor_parallel_size: Splits[PositiveInt] = 1
    """Ranks that share each matrix of a new expert. 1 keeps the grouped matrix products large."""
    sequence_parallel: Splits[bool] = True
    """SP: activations outside the matrices are split along the sequence over the TP ranks. Only matters with TP."""
    context_parallel_size: Splits[PositiveInt] = 1
    """CP: ranks that share the tokens of each sequence, for sequences too long for one."""

    @property
    def virtual_pipeline_model_parallel_size(self) -> int | None:
        """Megatron's number of model chunks per rank: None without interleaving."""
        chunks = self.num_virtual_stages_per_pipeline_rank
        return chunks if chunks > 1 else None

    @property
    def uses_sequence_parallel(self) -> bool:
        """Whether activations are split along the sequence, which needs TP."""
        return self.sequence_parallel and self.tensor_model_parallel_size > 1

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the original weights."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """DP: groups of ranks, each with micro-batches of its own; the CP ranks of a group share its sequences."""
        return world_size // (self.model_parallel_size * self.context_parallel_size)

    def check_world(self, world_size: int) -> None:
        """Check that the world splits into this layout.

        Raises:
            UserError: naming the numbers that do not fit and ones that do.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "sequence_parallel" and value < 1:
                raise UserError(f"{_flag(field.name)} {value}: must be at least 1")
        ranks = self.model_parallel_size * self.context_parallel_size
        if world_size % ranks:
            context = f" x CP {self.context_parallel_size}" if self.context_parallel_size > 1 else ""
            raise UserError(
                f"{world_size} ranks cannot hold TP {self.tensor_model_parallel_size} x PP "
                f"{self.pipeline_model_parallel_size}{context} = {ranks} ranks per model copy; "
                f"start a multiple of {ranks} ranks"
            )
        expert_ranks = (
            self.expert_tensor_parallel_size * self.expert_model_parallel_size * self.pipeline_model_parallel_size
        )
        if world_size % expert_ranks:
            raise UserError(
                f"{world_size} ranks cannot hold expert TP {self.expert_tensor_parallel_size} x EP "
                f"{self.expert_model_parallel_size} x PP {self.pipeline_model_parallel_size} = {expert_ranks} ranks "
                f"per copy of the new experts; start a multiple of {expert_ranks} ranks or lower "
                "--expert-model-parallel-size"
            )
        if self.num_virtual_stages_per_pipeline_rank > 1 and self.pipeline_model_parallel_size == 1:
            raise UserError("--num-virtual-stages-per-pipeline-rank needs --pipeline-model-parallel-size of 2 or more")

    def check_model(
        self,
        *,
        num_layers: int,
        hidden_size: int,
        ffn_hidden_size: int,
        num_attention_heads: int,
        num_query_groups: int,
        experts_per_layer: Sequence[int],
        is_mixture: bool = False,
    ) -> None:
        """Check that the model's dimensions split into this layout.

        Args:
            is_mixture: the base model has many original experts; which EP sizes fit is checked elsewhere.

        Raises:
            UserError: naming the dimension, the flag and the values that would fit.
        """
        tp, flag = self.tensor_model_parallel_size, "--tensor-model-parallel-size"
        _divides(tp, flag, num_attention_heads, "attention heads")
        _divides(tp, flag, num_query_groups, "key/value heads")
        _divides(tp, flag, ffn_hidden_size, "FFN columns")
        _divides(tp, flag, hidden_size, "hidden columns")
        _divides(self.expert_tensor_parallel_size, "--expert-tensor-parallel-size", ffn_hidden_size, "FFN columns")
        chunks = self.pipeline_model_parallel_size * self.num_virtual_stages_per_pipeline_rank
        flags = "--pipeline-model-parallel-size"
        if self.num_virtual_stages_per_pipeline_rank > 1:
            flags += " x --num-virtual-stages-per-pipeline-rank"
        _divides(chunks, flags, num_layers, "layers")
        has_experts = any(experts > 1 for experts in experts_per_layer)
        for experts in sorted({experts for experts in experts_per_layer if experts > 1 and not is_mixture}):
            check_expert_parallel(experts - 1, self.expert_model_parallel_size)
        if self.expert_model_parallel_size > 1 and not has_experts:
            raise UserError("--expert-model-parallel-size: the checkpoint is dense, there are no experts to share")
        if has_experts and tp > 1 and not self.sequence_parallel:
            raise UserError("--no-sequence-parallel: experts with TP need sequence parallelism; leave the flag out")

    def check_sequence(self, sequence_length: int) -> None:
        """Check that context and sequence parallelism can split sequences of this length.

        Raises:
            UserError: naming both numbers.
        """
        CP, TP = self.context_parallel_size, self.tensor_model_parallel_size
        if CP > 1 and sequence_length % (2 * CP):
            raise UserError(
                f"--context-parallel-size {CP}: each rank computes two parts of a sequence, and {2 * CP} does not "
                f"divide {sequence_length} tokens a sequence; change --seq-length"
            )
        if self.uses_sequence_parallel:
            tokens = "tokens a sequence" if CP == 1 else f"tokens of a sequence on each of {CP} CP ranks"
            _divides(TP, "--tensor-model-parallel-size", sequence_length // CP, tokens)


LONGEST_TIMEOUT_MINUTES = 7 * 24 * 60


def check_timeout(minutes: int) -> None:
    """Check the time-out of collectives: positive, and at most a week, after which a hanging run should have ended.

    Raises:
        UserError: naming the flag.
    """
    if not 1 <= minutes <= LONGEST_TIMEOUT_MINUTES:
        raise UserError(
            f"--distributed-timeout-minutes {minutes}: from 1 to {LONGEST_TIMEOUT_MINUTES:,} (a week), by default 10"
        )


def _flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def _divides(size: int, flag: str, amount: int, what: str) -> None:
    if amount % size:
        fitting = ", ".join(str(divisor) for divisor in range(1, min(amount, 64) + 1) if amount % divisor == 0)
        raise UserError(f"{flag} {size} does not divide {amount} {what}; it can be one of {fitting}")
