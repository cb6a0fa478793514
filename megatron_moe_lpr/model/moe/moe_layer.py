"""The MoE layer: a frozen original expert apart from the expert-parallel group of new experts."""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe_lpr.megatron.overriding import override, overrides_megatron, replace
from megatron_moe_lpr.model.configuration.fp8 import row_alignment
from megatron_moe_lpr.model.moe.expert_groups import dispatch_order
from megatron_moe_lpr.platform.side_stream import SideStream, behind_current


@dataclasses.dataclass
class MoELPRSubmodules:
    """The parts of the layer, chosen by the platform."""

    router: type
    original_expert: ModuleSpec
    experts: ModuleSpec


@overrides_megatron
class MoELPRLayer(MoELayer):
    """Output of a token x: sum over its top-k experts e of p_e * expert_e(x), where expert 0 is the original FFN.

    - `router` sees all experts.
    - `original_expert` is the dense model's FFN with the dense model's tensor parallelism, present on every EP rank:
      tokens that choose it never enter the all-to-all.
    - `experts` are the new experts, under EP and expert TP, behind Megatron's token dispatcher; after a second
      expansion `ExpertGroups`, which keeps those of earlier expansions apart from the latest one's.

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
        **options: Any,
    ) -> None:
        router = partial(_build_for_all_experts, submodules.router, num_experts)
        with _parameters_in_fp8(config) if fp8_parameters else contextlib.nullcontext():
            super().__init__(
                _new_experts_config(config, num_experts),
                MoESubmodules(experts=submodules.experts, router=router),
                layer_number,
                pg_collection,
                **options,
            )
        for weight in self.experts.parameters():
            # Megatron reduces these gradients over the expert-data-parallel ranks. Marked at EP=1 too, so that the
            # optimizer state keeps one form for every EP size.
            weight.allreduce = False
        self.dispatch_order: list[int] | None = None
        if groups:
            self.router.set_groups(groups, newest_weight)
            if self.ep_group.size() > 1:
                self.dispatch_order = dispatch_order(sum(groups[:-1]), groups[-1], self.ep_group.size())
        self.original_expert = build_module(
            submodules.original_expert,
            config=_original_expert_config(config),
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
            padding_mask: token tags, [batch, sequence / TP, 3] (`token_tags.py`), in Megatron's argument of this name.

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
        weights_TE, choices_TE = self.router(hidden_states, token_tags)
        counts = self._send_counts(choices_TE[:, 0])
        new_weights_TN, new_choices_TN = weights_TE[:, 1:], choices_TE[:, 1:]
        if self.dispatch_order:
            new_weights_TN, new_choices_TN = (
                new_weights_TN[:, self.dispatch_order],
                new_choices_TN[:, self.dispatch_order],
            )
        original = partial(self._original_expert_output, hidden_states, weights_TE[:, 0], choices_TE[:, 0], counts)
        new, (chosen_C, original_CD) = self._experts_and_original(
            hidden_states, new_weights_TN.contiguous(), new_choices_TN.contiguous(), original
        )
        mixture_TD = new.reshape(-1, new.shape[-1]).index_add(0, chosen_C, original_CD)
        return mixture_TD.view(new.shape)

    def _experts_and_original(
        self,
        hidden_states: torch.Tensor,
        weights_TN: torch.Tensor,
        choices_TN: torch.Tensor,
        original: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Outputs of the new experts and of `original`, which needs nothing from other EP ranks.

        With overlap: dispatch the new experts' tokens first, then launch the original expert on the side stream, so
        that with one hardware queue too (CUDA_DEVICE_MAX_CONNECTIONS=1) it computes during the all-to-all.
        """
        side = self.side_stream
        if side is None:
            return self._new_experts(hidden_states, weights_TN, choices_TN), original()
        outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        side.fork()
        new = self._new_experts(hidden_states, weights_TN, choices_TN, lambda: outputs.append(side.run(original)))
        return new, side.join(outputs[0])

    def _send_counts(self, choice_T: torch.Tensor) -> torch.Tensor:
        """Start the copy to the host of two numbers, [2]: how many tokens of this rank chose the original expert, and
        the most on any TP rank.

        Sequence parallelism gathers pieces of equal size, but the ranks' parts of the sequence choose the original
        expert unequally often. The copy runs on the same stream as the all-to-all dispatcher's own copies, before them,
        and has arrived when the dispatcher has waited for those (token_dispatcher.py `_maybe_dtoh_and_synchronize`;
        with a capacity before its first permutation): one wait for both. Other dispatchers have no such stream, and
        the host waits once more.
        """
        count = choice_T.sum()
        largest = count
        if self.config.sequence_parallel:
            largest = count.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.attn_tp_group)
        counts = torch.stack((count, largest))
        stream = getattr(self.token_dispatcher, "cuda_dtoh_stream", None)
        if stream is None:
            return counts
        with behind_current(stream):
            return token_dispatcher.maybe_move_tensor_to_cpu(counts, record_stream=True)

    def _new_experts(
        self,
        hidden_states: torch.Tensor,
        weights_TN: torch.Tensor,
        choices_TN: torch.Tensor,
        on_dispatched: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """Weighted sum of the new experts, zeros for tokens that chose none of them. `on_dispatched` is called when the
        all-to-all of the tokens has been launched."""
        with _restore_dispatcher_state(self.token_dispatcher):
            tokens, token_weights = self.token_dispatcher.dispatch_preprocess(hidden_states, choices_TN, weights_TN)
            rows_RD, weights_R = self.dispatch(tokens, token_weights)
            on_dispatched()
            output_RD, _ = self.routed_experts_compute(rows_RD, weights_R)
            return self.token_dispatcher.combine_postprocess(self.combine(output_RD))

    def _original_expert_output(
        self, hidden_states: torch.Tensor, weight_T: torch.Tensor, choice_T: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output of the original expert for the tokens that chose it.

        Args:
            weight_T: the router's weight of the original expert.
            choice_T: bool, whether the token chose the original expert.
            counts: what `_send_counts` returned; the copy must have arrived.

        Returns:
            Numbers of those tokens, [C], and weight * original_expert(x) of each, [C, hidden].
        """
        count, largest = counts.tolist()
        # The indices in order, like `nonzero`, for which the host would wait for the device.
        chosen_C = choice_T.to(torch.uint8).argsort(descending=True, stable=True)[:count]
        tokens_CD = hidden_states.reshape(-1, hidden_states.shape[-1]).index_select(0, chosen_C)
        # All TP ranks must bring equally many rows; the linear layers take [rows, 1, hidden].
        padding = self._original_expert_rows(largest) - count
        padded = torch.nn.functional.pad(tokens_CD, (0, 0, 0, padding)).unsqueeze(1)
        output, _ = self.original_expert(padded)
        output_CD = output.squeeze(1)[:count] * weight_T.index_select(0, chosen_C).unsqueeze(1)
        return chosen_C, output_CD.to(hidden_states.dtype)

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
    the next micro-batch. After a recomputed layer these would hold its graph and with it the layer's input and that
    input's gradient, for every layer of a pipeline rank."""
    before = dict(vars(dispatcher))
    try:
        yield
    finally:
        vars(dispatcher).clear()
        vars(dispatcher).update(before)


@contextlib.contextmanager
def _parameters_in_fp8(config: TransformerConfig) -> Iterator[None]:
    """Build Transformer Engine's linear layers with weights in FP8 while the block runs.

    Under `no_grad`, so that fp8_utils.py `get_fp8_context` keeps no second copy of the initial values: the optimizer
    would start from that copy, whereas here a checkpoint that is read later fills the weights.
    """
    config = copy.copy(config)
    replace(config, fp8_param=True)
    with torch.no_grad(), get_fp8_context(config, is_init=True):
        yield


def _build_for_all_experts(
    router: type,
    num_experts: int,
    *,
    config: TransformerConfig,
    pg_collection: ProcessGroupCollection | None,
    **options: Any,
) -> torch.nn.Module:
    """Build the router for all experts: the layer's own configuration counts the new experts only."""
    config = copy.copy(config)
    replace(config, num_moe_experts=num_experts, moe_expert_capacity_factor=None)
    return router(config=config, pg_collection=pg_collection, **options)


def _new_experts_config(config: TransformerConfig, num_experts: int) -> TransformerConfig:
    config = copy.copy(config)
    # A token has 0 to k new experts, where the all-to-all dispatcher assumes k. With a capacity it counts the rows
    # (token_dispatcher.py `preprocess`); an infinite capacity drops nothing.
    replace(config, num_moe_experts=num_experts - 1, moe_expert_capacity_factor=math.inf)
    return config


def _original_expert_config(config: TransformerConfig) -> TransformerConfig:
    config = copy.copy(config)
    replace(config, num_moe_experts=None)
    return config
