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
      expansion `ExpertGroups`, those of earlier expansions and the latest one's apart.

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
        openness: float = 1.0,
        **options: Any,
    ) -> None:
        router = partial(_build_for_all_experts, submodules.router, num_experts)
        with _parameters_in_fp8(config) if fp8_parameters else contextlib.nullcontext():
            super().__init__(
                _config_of_new_experts(config, num_experts),
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
            self.router.set_groups(groups, openness)
            if self.ep_group.size() > 1:
                self.dispatch_order = dispatch_order(sum(groups[:-1]), groups[-1], self.ep_group.size())
        self.original_expert = build_module(
            submodules.original_expert,
            config=_config_of_original_expert(config),
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
            intermediate_tensors: Megatron's argument for CUDA graphs, which this layer does not take part in.
            padding_mask: what travels in Megatron's argument of this name, [batch, sequence / TP, ...].

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
        weights, choices = self.router(hidden_states, token_tags)
        counts = self._send_counts(choices[:, 0])
        new_weights, new_choices = weights[:, 1:], choices[:, 1:]
        if self.dispatch_order:
            new_weights, new_choices = new_weights[:, self.dispatch_order], new_choices[:, self.dispatch_order]
        original = partial(self._of_original_expert, hidden_states, weights[:, 0], choices[:, 0], counts)
        new, (chosen, rows) = self._both(hidden_states, new_weights.contiguous(), new_choices.contiguous(), original)
        flat = new.reshape(-1, new.shape[-1]).index_add(0, chosen, rows)
        return flat.view(new.shape)

    def _both(
        self,
        hidden_states: torch.Tensor,
        weights: torch.Tensor,
        choices: torch.Tensor,
        original: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """What the new experts give, and what the original one does, which needs nothing that travels.

        Beside: the tokens of the new experts are sent first and the original expert is launched then, so that also on
        a device with one hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1) it computes while they are under way.
        """
        side = self.side_stream
        if side is None:
            return self._new_experts(hidden_states, weights, choices), original()
        made: list[tuple[torch.Tensor, torch.Tensor]] = []
        side.fork()
        new = self._new_experts(hidden_states, weights, choices, lambda: made.append(side.run(original)))
        return new, side.join(made[0])

    def _send_counts(self, choice: torch.Tensor) -> torch.Tensor:
        """Start the copy to the host of how many tokens chose the original expert, here and at most on a TP rank: [2].

        Sequence parallelism gathers pieces of equal size, but the ranks' parts of the sequence choose the original
        expert unequally often. The copy runs on the stream of the all-to-all dispatcher's own, before them, and has
        arrived when the dispatcher has waited for those (token_dispatcher.py `_maybe_dtoh_and_synchronize`; with a
        capacity before its first permutation): one wait for both. Other dispatchers have no such stream: a wait more.
        """
        count = choice.sum()
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
        weights: torch.Tensor,
        choices: torch.Tensor,
        sent: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """Weighted sum of the new experts; tokens that chose none of them get zeros. `sent` is called when the tokens
        are on their way."""
        with _forgetting(self.token_dispatcher):
            tokens, token_weights = self.token_dispatcher.dispatch_preprocess(hidden_states, choices, weights)
            tokens, token_weights = self.dispatch(tokens, token_weights)
            sent()
            output, _ = self.routed_experts_compute(tokens, token_weights)
            return self.token_dispatcher.combine_postprocess(self.combine(output))

    def _of_original_expert(
        self, hidden_states: torch.Tensor, weight: torch.Tensor, choice: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens whose `choice` ([tokens], bool) is set, [count], and weight * original_expert(x) of each,
        [count, hidden]. `counts`: see `_send_counts`; they must have arrived."""
        count, largest = counts.tolist()
        # The indices in their order, as `nonzero` gives them, without its wait for the device.
        chosen = choice.to(torch.uint8).argsort(descending=True, stable=True)[:count]
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1]).index_select(0, chosen)
        padding = self._rows_of_original_expert(largest) - count
        tokens = torch.nn.functional.pad(tokens, (0, 0, 0, padding)).unsqueeze(1)
        original, _ = self.original_expert(tokens)
        original = original.squeeze(1)[:count] * weight.index_select(0, chosen).unsqueeze(1)
        return chosen, original.to(hidden_states.dtype)

    def _rows_of_original_expert(self, largest: int) -> int:
        """Rows each TP rank brings to the original expert: at least 1, aligned for FP8 and on the CPU in bf16 as the
        new experts' rows are. A row of zeros comes out as zeros."""
        if self.config.transformer_impl == "local" and self.config.bf16:
            from megatron_moe_lpr.platform.cpu.expert_rows import rounded

            return rounded(max(1, largest))
        alignment = 1
        if self.config.fp8:
            alignment = row_alignment(self.config.fp8_recipe, self.config.sequence_parallel)
        return max(1, math.ceil(largest / alignment)) * alignment


@contextlib.contextmanager
def _forgetting(dispatcher: MoETokenDispatcher) -> Iterator[None]:
    """Megatron's dispatcher keeps a micro-batch's weights, choices and rows until the next one. After a recomputed
    layer these hold its graph and with it the layer's input and the gradient of that, for every layer of a stage."""
    before = dict(vars(dispatcher))
    try:
        yield
    finally:
        vars(dispatcher).clear()
        vars(dispatcher).update(before)


@contextlib.contextmanager
def _parameters_in_fp8(config: TransformerConfig) -> Iterator[None]:
    """Transformer Engine's linear layers built inside keep their weights in FP8.

    Without gradients, so that fp8_utils.py `get_fp8_context` does not ask for a second copy of the initial values: the
    optimizer would start from these, and here the weights come from a checkpoint that is read later.
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


def _config_of_new_experts(config: TransformerConfig, num_experts: int) -> TransformerConfig:
    config = copy.copy(config)
    # A token has 0 to k new experts, where the all-to-all dispatcher counts on k. With a capacity it counts for
    # itself (token_dispatcher.py `preprocess`); an infinite one drops nothing.
    replace(config, num_moe_experts=num_experts - 1, moe_expert_capacity_factor=math.inf)
    return config


def _config_of_original_expert(config: TransformerConfig) -> TransformerConfig:
    config = copy.copy(config)
    replace(config, num_moe_experts=None)
    return config
