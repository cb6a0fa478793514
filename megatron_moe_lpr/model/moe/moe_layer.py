"""The MoE layer: a frozen original expert apart from the expert-parallel group of new experts."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe_lpr.megatron.overriding import override, overrides_megatron
from megatron_moe_lpr.model.configuration.fp8 import row_alignment
from megatron_moe_lpr.model.moe.dispatch_counts import exchange_counts
from megatron_moe_lpr.model.moe.expert_groups import dispatch_order
from megatron_moe_lpr.model.moe.part_configurations import (
    build_router,
    dispatched_experts_config,
    original_expert_config,
    parameters_in_fp8,
)
from megatron_moe_lpr.model.moe.sorted_rows import SortedRows, join, sort_rows
from megatron_moe_lpr.model.moe.weighted_rows import WeightedRows
from megatron_moe_lpr.platform.side_stream import SideStream, behind_current


@dataclasses.dataclass
class MoELPRSubmodules:
    """The parts of the layer, chosen by the platform."""

    router: type
    original_expert: ModuleSpec
    shared_experts: ModuleSpec
    experts: ModuleSpec


@overrides_megatron
class MoELPRLayer(MoELayer):
    """Output of a token x: sum over its top-k experts e of p_e * expert_e(x), where expert 0 is the original FFN.

    - `router` sees all experts.
    - `original_expert` is the dense model's FFN with the dense model's tensor parallelism, present on every EP rank:
      tokens that choose it never enter the all-to-all.
    - `experts` are the new experts, under EP and expert TP, behind Megatron's token dispatcher; after a second
      expansion `ExpertGroups`, which keeps those of earlier expansions apart from the latest one's.
    - Of a base model that is a mixture there is no `original_expert`: `experts` holds all of its experts too, frozen,
      as a group of their own, and `shared_experts` is the FFN that every token passes, where the base has one.

    Mirrors `MoELayer` of megatron-core, whose single group of experts holds all of them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoELPRSubmodules,
        num_experts: int,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        fp8_parameters: bool = False,
        groups: tuple[int, ...] = (),
        newest_weight: float = 1.0,
        base: int = 0,
        **options: Any,
    ) -> None:
        router = partial(build_router, submodules.router, num_experts, base)
        self.num_apart = 0 if base else 1
        with parameters_in_fp8(config) if fp8_parameters else contextlib.nullcontext():
            super().__init__(
                dispatched_experts_config(config, num_experts - self.num_apart),
                MoESubmodules(submodules.experts, submodules.shared_experts, router),
                layer_number,
                pg_collection,
                **options,
            )
        for weight in self.experts.parameters():
            # Megatron reduces these gradients over the expert-data-parallel ranks. Marked at EP=1 too, so that the
            # optimizer state keeps one form for every EP size.
            weight.allreduce = False
        self.dispatch_order: list[int] | None = None
        self._expert_columns: torch.Tensor | None = None
        if groups:
            self.router.set_groups(groups, newest_weight)
            if self.ep_group.size() > 1:
                self.dispatch_order = dispatch_order((base, sum(groups[:-1]), groups[-1]), self.ep_group.size())
        if self.num_apart:
            self.original_expert = build_module(
                submodules.original_expert,
                config=original_expert_config(config),
                ffn_hidden_size=config.ffn_hidden_size,
                tp_group=self.attn_tp_group,
            )
        self.side_stream = SideStream() if config.original_expert_overlap and self.ep_group.size() > 1 else None

    @override
    def forward(
        self,
        hidden_states: torch.Tensor,
        intermediate_tensors: None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Compute the layer.

        Args:
            hidden_states: [sequence / TP, batch, hidden] under sequence parallelism, else [sequence, batch, hidden].
            intermediate_tensors: Megatron's argument for CUDA graphs, which this layer does not support.
            padding_mask: token tags, [batch, sequence / TP, 4] (`token_tags.py`), in Megatron's argument of this name.

        Returns:
            [sequence / TP, batch, hidden] and no bias.
        """
        token_tags = None if padding_mask is None else padding_mask.transpose(0, 1)
        if self.moe_layer_recompute:
            return self._checkpointed(hidden_states, token_tags), None
        return self._mixture(hidden_states, token_tags), None

    def _checkpointed(self, hidden_states: torch.Tensor, token_tags: torch.Tensor | None) -> torch.Tensor:
        if self.config.fp8:
            from megatron.core.extensions.transformer_engine import te_checkpoint

            tracker = tensor_parallel.random.get_cuda_rng_tracker
            return te_checkpoint(self._mixture, False, tracker, self.attn_tp_group, hidden_states, token_tags)
        return tensor_parallel.checkpoint(self._mixture, False, hidden_states, token_tags)

    def _mixture(self, hidden_states: torch.Tensor, token_tags: torch.Tensor | None) -> torch.Tensor:
        weights_TE, choices_TE, hidden_states = self.router(hidden_states, token_tags)
        if self.dispatch_order is not None:
            columns = self._columns(weights_TE.device)
            weights_TE, choices_TE = weights_TE.index_select(1, columns), choices_TE.index_select(1, columns)
        tokens_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.token_dispatcher.ep_size * self.token_dispatcher.tp_size == 1:
            mixture_TD = self._mixture_of_own_rows(tokens_TD, weights_TE, choices_TE)
        elif isinstance(self.token_dispatcher, token_dispatcher.MoEAlltoAllTokenDispatcher):
            mixture_TD = self._mixture_of_sent_rows(tokens_TD, weights_TE, choices_TE)
        else:
            mixture_TD = self._mixture_of_two(hidden_states, weights_TE, choices_TE)
        mixture = mixture_TD.view(hidden_states.shape)
        return mixture if self.shared_experts is None else mixture + self.shared_experts(hidden_states)

    def _mixture_of_own_rows(
        self, tokens_TD: torch.Tensor, weights_TE: torch.Tensor, choices_TE: torch.Tensor
    ) -> torch.Tensor:
        """Mixture where this rank holds all experts: one sort of the tokens' rows, those of the original expert first.

        The sort is launched before the host waits for the counts.
        """
        counts = self._send_counts(choices_TE)
        rows = self._sort(tokens_TD, weights_TE, choices_TE)
        counts = self._received(counts)
        if not self.num_apart:
            return rows.sum_by_token(self.experts(rows.rows, counts[: choices_TE.shape[1]], rows.weights)[0])
        count, largest = int(counts[0]), self._largest(counts)
        (own_CD, own_weights_C), (new_RD, new_weights_R) = self._split(rows, count, largest)
        new_outputs_RD, _ = self.experts(new_RD, counts[1 : choices_TE.shape[1]], new_weights_R)
        # Last, so that its backward pass comes first, and frees what it kept before the gradients of weights appear.
        original_CD = self._original_expert_output(own_CD, own_weights_C, largest)
        return rows.sum_by_token(self._join(original_CD, new_outputs_RD, count))

    def _mixture_of_sent_rows(
        self, tokens_TD: torch.Tensor, weights_TE: torch.Tensor, choices_TE: torch.Tensor
    ) -> torch.Tensor:
        """The same where new experts lie on other ranks: only their part of the rows enters the all-to-all.

        Mirrors token_dispatcher.py `dispatch_preprocess` and `combine_postprocess` of the all-to-all dispatcher,
        without what these keep in the dispatcher until the next micro-batch: after a recomputed layer that would hold
        its graph, and with it the layer's input and that input's gradient, for every layer of a pipeline rank.
        """
        dispatcher = self.token_dispatcher
        counts = self._send_counts(choices_TE[:, :1]) if self.config.sequence_parallel and self.num_apart else None
        # Here the host waits, for these counts and those of `_send_counts`.
        exchange_counts(dispatcher, choices_TE[:, self.num_apart :], self._to_host, self._received)
        count = self._num_rows(tokens_TD) - int(sum(dispatcher.input_splits))
        largest = count if counts is None else self._largest(counts)
        dispatcher.probs = weights_TE.new_empty(0)  # `combine_preprocess` asks for the dtype
        rows = self._sort(tokens_TD, weights_TE, choices_TE)
        if not self.num_apart:
            return rows.sum_by_token(self._sent(rows.rows, rows.weights))
        (own_CD, own_weights_C), (new_RD, new_weights_R) = self._split(rows, count, largest)
        new = partial(self._sent, new_RD, new_weights_R)
        original = partial(self._original_expert_output, own_CD, own_weights_C, largest)
        new_outputs_RD, original_CD = self._new_and_original(new, original)
        return rows.sum_by_token(self._join(original_CD, new_outputs_RD, count))

    def _sent(
        self, rows_RD: torch.Tensor, weights_R: torch.Tensor, on_dispatched: Callable[[], None] = lambda: None
    ) -> torch.Tensor:
        """Outputs of experts on other ranks; `on_dispatched` is called when the rows' all-to-all is launched."""
        received_RD, received_weights_R = self.dispatch(rows_RD, weights_R)
        on_dispatched()
        return self.combine(self.routed_experts_compute(received_RD, received_weights_R)[0])

    def _mixture_of_two(
        self, hidden_states: torch.Tensor, weights_TE: torch.Tensor, choices_TE: torch.Tensor
    ) -> torch.Tensor:
        """The same with another dispatcher, which sorts the new experts' rows behind its exchange: two sums added up.

        The dispatcher's attributes are restored: see `_mixture_of_sent_rows`.
        """
        counts = self._send_counts(choices_TE[:, :1])
        first = self.num_apart
        new_weights_TN, new_choices_TN = weights_TE[:, first:].contiguous(), choices_TE[:, first:].contiguous()

        def new(on_dispatched: Callable[[], None]) -> torch.Tensor:
            with _restore_dispatcher_state(self.token_dispatcher):
                dispatcher = self.token_dispatcher
                tokens, token_weights = dispatcher.dispatch_preprocess(hidden_states, new_choices_TN, new_weights_TN)
                rows_RD, weights_R = self.dispatch(tokens, token_weights)
                on_dispatched()
                output_RD, _ = self.routed_experts_compute(rows_RD, weights_R)
                return dispatcher.combine_postprocess(self.combine(output_RD))

        def original() -> torch.Tensor:
            received = self._received(counts)
            tokens_TD, fused = hidden_states.reshape(-1, hidden_states.shape[-1]), self.config.moe_permute_fusion
            weights_T1, choices_T1 = weights_TE[:, :1].contiguous(), choices_TE[:, :1].contiguous()
            rows = sort_rows(tokens_TD, weights_T1, choices_T1, int(received[0]), fused)
            return rows.sum_by_token(self._original_expert_output(rows.rows, rows.weights, self._largest(received)))

        if not self.num_apart:
            return new(lambda: None)
        new_TD, original_TD = self._new_and_original(new, original)
        return new_TD.view(original_TD.shape) + original_TD

    def _columns(self, device: torch.device) -> torch.Tensor:
        """Numbers of the experts: a single original one first, then those that EP ranks share in the order in which
        these hold them."""
        # The host waits for the device when it copies numbers there: one copy for all steps.
        if self._expert_columns is None or self._expert_columns.device != device:
            order = self.dispatch_order or []
            apart = self.num_apart
            self._expert_columns = torch.tensor([*range(apart), *(apart + column for column in order)], device=device)
        return self._expert_columns

    def _sort(self, tokens_TD: torch.Tensor, weights_TE: torch.Tensor, choices_TE: torch.Tensor) -> SortedRows:
        fused = self.config.moe_permute_fusion
        return sort_rows(tokens_TD, weights_TE, choices_TE, self._num_rows(tokens_TD), fused)

    def _split(
        self, rows: SortedRows, count: int, largest: int
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Rows and weights of the original expert, which takes others behind its `count` own ones instead of padding,
        and of the new experts."""
        return rows.split(count, min(self._original_expert_rows(largest), len(rows.rows)))

    def _join(self, original_CD: torch.Tensor, new_outputs_RD: torch.Tensor, count: int) -> torch.Tensor:
        trains = any(weight.requires_grad for weight in self.original_expert.parameters())
        return join(original_CD, new_outputs_RD, count, trains)

    def _num_rows(self, tokens_TD: torch.Tensor) -> int:
        """Rows of all experts together: every token has its top k."""
        return len(tokens_TD) * self.config.moe_router_topk

    def _new_and_original(
        self, new: Callable[[Callable[[], None]], torch.Tensor], original: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs of the new experts and of `original`, which needs nothing from other EP ranks.

        With overlap: dispatch the new experts' tokens first, then launch the original expert on the side stream, so
        that with one hardware queue too (CUDA_DEVICE_MAX_CONNECTIONS=1) it computes during the all-to-all.

        Args:
            new: is given a function to call when the tokens' all-to-all has been launched.
        """
        side = self.side_stream
        if side is None:
            return new(lambda: None), original()
        outputs: list[tuple[torch.Tensor]] = []
        side.fork()
        new_outputs = new(lambda: outputs.append(side.run(lambda: (original(),))))
        return new_outputs, side.join(outputs[0])[0]

    def _send_counts(self, choices_TE: torch.Tensor) -> torch.Tensor:
        """Start the copy to the host of some counts: how many tokens of this rank chose each expert, [experts], and,
        under sequence parallelism, behind them the most that chose the first one on any TP rank.

        Sequence parallelism gathers pieces of equal size, but the ranks' parts of the sequence choose the original
        expert unequally often. The copy runs on the same stream as the all-to-all dispatcher's own copies, before them,
        and has arrived when the host has waited for those (token_dispatcher.py `_maybe_dtoh_and_synchronize`): one wait
        for both. Other dispatchers have no such stream, and the host waits once more.
        """
        if self.config.sequence_parallel:
            experts = choices_TE.shape[1]
            counts = torch.empty(experts + 1, dtype=torch.long, device=choices_TE.device)
            torch.sum(choices_TE, dim=0, out=counts[:experts])
            largest = counts[experts:].copy_(counts[:1])
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.attn_tp_group)
        else:
            counts = choices_TE.sum(dim=0)
        return self._to_host(counts)

    def _to_host(self, counts: torch.Tensor) -> torch.Tensor:
        """Start a copy to the host; without a stream for it the tensor itself."""
        stream = self._copy_stream()
        if stream is None:
            return counts
        with behind_current(stream):
            return token_dispatcher.maybe_move_tensor_to_cpu(counts, record_stream=True)

    def _largest(self, counts: torch.Tensor) -> int:
        """The most tokens of any TP rank that chose the original expert, from the counts on the host."""
        return int(counts[-1 if self.config.sequence_parallel else 0])

    def _received(self, counts: torch.Tensor) -> torch.Tensor:
        """The counts on the host, which waits for their copy."""
        stream = self._copy_stream()
        if stream is None:
            return counts.cpu()
        stream.synchronize()
        return counts

    def _copy_stream(self) -> Any:
        """The all-to-all dispatcher's stream of copies to the host; None with another dispatcher."""
        return getattr(self.token_dispatcher, "cuda_dtoh_stream", None)

    def _original_expert_output(self, rows_CD: torch.Tensor, weights_C: torch.Tensor, largest: int) -> torch.Tensor:
        """weight * original_expert(x) of each row.

        Args:
            rows_CD: the tokens that chose the original expert.
            weights_C: the router's weight of the original expert for each.
            largest: the most rows of any TP rank.

        Returns:
            [rows, hidden].
        """
        count = len(rows_CD)
        # All TP ranks must bring equally many rows; the linear layers take [rows, 1, hidden].
        padding = self._original_expert_rows(largest) - count
        if padding:
            # Unlike `pad`, `cat` launches nothing in backward.
            rows_CD = torch.cat((rows_CD, rows_CD.new_zeros(padding, rows_CD.shape[1])))
            weights_C = torch.cat((weights_C, weights_C.new_zeros(padding)))
        # Inside the expert each TP rank has a part of every row, and would need the weights of all ranks' rows.
        is_split = self.attn_tp_group.size() > 1
        output, _ = self.original_expert(rows_CD.unsqueeze(1), per_token_scale=None if is_split else weights_C)
        output_CD = output.squeeze(1)
        if is_split:
            compiled = self.config.transformer_impl == "transformer_engine"
            output_CD = WeightedRows.apply(output_CD, weights_C, compiled)
        return output_CD[:count] if padding else output_CD

    def _original_expert_rows(self, largest: int) -> int:
        """Rows that each TP rank brings to the original expert: at least 1, aligned for FP8, and on the CPU in bf16
        rounded up as the new experts' rows are. Rows of zeros come out as zeros."""
        if self.config.padded_expert_rows:
            from megatron_moe_lpr.platform.cpu.expert_rows import bucket_size

            return bucket_size(max(1, largest))
        alignment = 1
        if self.config.fp8:
            alignment = row_alignment(self.config.fp8_recipe, self.config.sequence_parallel)
        return max(1, math.ceil(largest / alignment)) * alignment


@contextlib.contextmanager
def _restore_dispatcher_state(dispatcher: MoETokenDispatcher) -> Iterator[None]:
    """Restore the dispatcher's attributes afterwards: Megatron's keeps a micro-batch's weights, choices and rows until
    the next micro-batch."""
    before = dict(vars(dispatcher))
    try:
        yield
    finally:
        vars(dispatcher).clear()
        vars(dispatcher).update(before)
