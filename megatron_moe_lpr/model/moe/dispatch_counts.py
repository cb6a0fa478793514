"""How many rows the all-to-all exchanges, for Megatron's dispatcher."""

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


def exchange_counts(
    dispatcher: MoEAlltoAllTokenDispatcher,
    choices_TE: torch.Tensor,
    to_host: Callable[[torch.Tensor], torch.Tensor],
    received: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Let ranks know how many rows they send each other, and set the dispatcher's attributes that say so.

    Mirrors token_dispatcher.py `preprocess` and `_maybe_dtoh_and_synchronize`, which add up the same table four times
    on the device and copy each sum to the host. Here the table is copied, and the host adds up.

    Args:
        choices_TE: [tokens, experts that the dispatcher knows], bool.
        to_host: starts a copy to the host.
        received: returns that copy when it has arrived.
    """
    counts_E, group = choices_TE.sum(dim=0), dispatcher.tp_ep_group
    table_RE = gather_from_sequence_parallel_region(counts_E, group=group).view(group.size(), -1)
    copied = to_host(table_RE)
    if dispatcher.num_local_experts > 1 and dispatcher.config.moe_permute_fusion:
        # For the kernel that sorts what arrives.
        dispatcher.num_global_tokens_per_local_expert = _by_tp(dispatcher, table_RE).contiguous().flatten(0, 1)
    add_up_on_host(dispatcher, received(copied))


def add_up_on_host(dispatcher: MoEAlltoAllTokenDispatcher, table_RE: torch.Tensor) -> None:
    """Set numbers of rows: `input_splits` and `output_splits` of each EP rank, `output_splits_tp` of each expert TP
    rank, `tokens_per_expert` of this rank's experts.

    Args:
        table_RE: [ranks of the dispatcher's group, experts], on the host.
    """
    local_TRE = _by_tp(dispatcher, table_RE)
    sums_TR = local_TRE.sum(dim=2)
    own_E = table_RE[dispatcher.tp_ep_group.rank()]
    dispatcher.input_splits = own_E.view(dispatcher.ep_size, -1).sum(dim=1).numpy()
    dispatcher.output_splits = sums_TR[dispatcher.tp_rank].numpy()
    dispatcher.output_splits_tp = sums_TR.sum(dim=1).numpy()
    dispatcher.tokens_per_expert = local_TRE.sum(dim=(0, 1))
    if dispatcher.num_local_experts > 1 and not dispatcher.config.moe_permute_fusion:
        dispatcher.num_global_tokens_per_local_expert = local_TRE.contiguous().flatten(0, 1)


def _by_tp(dispatcher: MoEAlltoAllTokenDispatcher, table_RE: torch.Tensor) -> torch.Tensor:
    """Rows of this rank's experts, [expert TP ranks, EP ranks, local experts]."""
    experts = dispatcher.local_expert_indices
    by_rank = table_RE.view(dispatcher.ep_size, dispatcher.tp_size, -1).transpose(0, 1)
    return by_rank[:, :, experts[0] : experts[-1] + 1]
