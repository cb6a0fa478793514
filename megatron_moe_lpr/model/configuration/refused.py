"""Options of Megatron-Core that do not go with this project's layers, each refused with its reason."""

import dataclasses
from typing import Annotated, Literal

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_marks import Free, T

Refused = Annotated[T, Free("refused")]
NO_TAGS = (
    "a layer that Megatron replays calls its MoE layer without the language tags of the tokens, and the LPR loss would "
    "be lost; no GPU has captured a layer of this project"
)
REASONS = {
    "overlap_moe_expert_parallel_comm": (
        "Megatron's combined schedule calls parts of its own MoE layer, without the language tags of the tokens and "
        "without the original expert; use --original-expert-overlap"
    ),
    "delay_wgrad_compute": "it is a part of --overlap-moe-expert-parallel-comm, which is not offered",
    "cuda_graph_impl": NO_TAGS,
    "enable_cuda_graph": NO_TAGS,
    "external_cuda_graph": NO_TAGS,
    "cuda_graph_scope": "it is of --cuda-graph-impl, which is not offered",
    "cuda_graph_modules": "it is of --cuda-graph-impl, which is not offered",
}
"""Why each is refused, from Megatron's sources: models/gpt/fine_grained_callables.py `submodule_attn_forward` and
transformer/transformer_layer.py `_te_cuda_graph_replay`."""


@dataclasses.dataclass(frozen=True)
class RefusedOptions:
    """Flags of Megatron's that are known, so that a refusal can say why."""

    overlap_moe_expert_parallel_comm: Refused[bool] = False
    """Not offered: Megatron's schedule would leave the original expert and the LPR loss out."""
    delay_wgrad_compute: Refused[bool] = False
    """Not offered: a part of --overlap-moe-expert-parallel-comm."""
    cuda_graph_impl: Refused[Literal["none", "local", "transformer_engine", "full_iteration"]] = "none"
    """Not offered but for none: a replayed layer would leave the LPR loss out."""
    cuda_graph_scope: Refused[tuple[str, ...] | None] = None
    """Not offered: of --cuda-graph-impl."""
    cuda_graph_modules: Refused[tuple[str, ...] | None] = None
    """Not offered: the newer name of --cuda-graph-scope."""
    enable_cuda_graph: Refused[bool] = False
    """Not offered: the old name of --cuda-graph-impl local."""
    external_cuda_graph: Refused[bool] = False
    """Not offered: the old name of --cuda-graph-impl transformer_engine."""


def check_refused(options: RefusedOptions) -> None:
    """Check that no option is given that the model's layers do not go with.

    Raises:
        UserError: naming the flag, with the reason.
    """
    for field in dataclasses.fields(options):
        if getattr(options, field.name) != field.default:
            raise UserError(f"--{field.name.replace('_', '-')} is not offered: {REASONS[field.name]}")
