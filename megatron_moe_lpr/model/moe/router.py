"""The router over the original expert and the new ones, with Language Priors Routing."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter

from megatron_moe_lpr.megatron.overriding import override, overrides_megatron
from megatron_moe_lpr.model.configuration.config import MoELPRConfig
from megatron_moe_lpr.model.moe.attached_losses import AttachedLosses, RouterLosses
from megatron_moe_lpr.model.moe.losses import load_balancing_loss, lpr_negative_log_likelihood
from megatron_moe_lpr.model.moe.routing_statistics import RoutingStatistics
from megatron_moe_lpr.model.moe.token_tags import GROUP, PRIOR, SHARE


class RouterProduct(torch.autograd.Function):
    """Hidden states times router weights, both as fp32; the hidden states are kept for backward in their own dtype.

    It also returns the hidden states, for the experts: so backward is given their gradient from there, and adds its own
    in one operation, in fp32. Autograd would round this one first and add up two rounded ones.

    Mirrors moe_utils.py `RouterGatingLinearFunction` without its choice of Transformer Engine's product: version 2.9
    would multiply fp32 weights with bf16 hidden states, which cuBLASLt refuses, and other versions round otherwise.
    """

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., hidden] and [experts, hidden] to fp32 [..., experts], and the hidden states."""
        ctx.save_for_backward(hidden_states, weight)
        ctx.set_materialize_grads(False)
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = torch.mm(hidden_TD.float(), weight.float().t())
        return logits_TE.view(*hidden_states.shape[:-1], weight.shape[0]), hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(
        ctx: Any, grad_output: torch.Tensor | None, grad_hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients of hidden states and weight in their dtypes, None for what is frozen."""
        if grad_output is None:
            return grad_hidden, None
        hidden_states, weight_ED = ctx.saved_tensors
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        grad_logits_TE = grad_output.reshape(-1, weight_ED.shape[0])
        grad_weight = None
        if ctx.needs_input_grad[0]:
            own = torch.mm(grad_logits_TE, weight_ED.float()).view(hidden_states.shape)
            grad_hidden = own.to(hidden_states.dtype) if grad_hidden is None else _sum(grad_hidden, own)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.mm(grad_logits_TE.t(), hidden_TD.float()).to(weight_ED.dtype)
        return grad_hidden, grad_weight


def _sum(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The sum of two tensors, added up in the wider dtype, in the first one's dtype."""
    return torch.add(first, second, out=torch.empty_like(first))


@overrides_megatron
class LPRRouter(TopKRouter):
    """Megatron's top-k router with the paper's losses, and weights that stay in fp32 whatever the model is cast to.

    softmax over all experts, top-k and renormalisation over the k is Megatron's top-k-then-softmax
    (`moe_router_pre_softmax=False`) for k of 2 or more.

    The losses are attached to the logits by `AttachedLosses`. Megatron's own load balancing is left
    off: it is normalised by k, summed over layers, and under `calculate_per_token_loss` with sequence parallelism
    scaled by this rank's tokens instead of the micro-batch's (router.py `attach_and_log_load_balancing_loss`).
    """

    def __init__(
        self, config: MoELPRConfig, pg_collection: ProcessGroupCollection | None = None, base: int = 0, **options: Any
    ) -> None:
        """`base`: experts of a base model that is a mixture, whose rows are a parameter of their own, `base_rows`, so
        that they can stay frozen; 0: the base model is dense."""
        super().__init__(config=config, pg_collection=pg_collection, **options)
        self.base_rows: torch.nn.Parameter | None = None
        if base:
            self._split_rows(base)
        self.statistics = RoutingStatistics(self.num_experts)
        self.counts_in_training = True
        """Whether training adds to the statistics: the training loop lets only steps that are logged do so."""
        self.group_ends: list[int] | None = None
        """For each language group but the latest: how many experts it and the groups before it have. None before a
        second expansion of a dense model: original languages have the original expert alone."""
        self.newest_weight, self.num_earlier = 1.0, self.num_experts

    def set_groups(self, groups: tuple[int, ...], newest_weight: float) -> None:
        """Say which experts each expansion added.

        Args:
            groups: new experts by expansion, at least two; of a mixture base at least one.
            newest_weight: weight of the latest expansion's experts in the softmax, 0 to 1. At 0 the router computes
                exactly what it did before the expansion; at 1 it is the stock softmax.
        """
        original = 1 if self.base_rows is None else len(self.base_rows)
        self.group_ends = list(itertools.accumulate((original, *groups[:-1])))
        self._group_ends: torch.Tensor | None = None
        self.num_earlier, self.newest_weight = self.group_ends[-1], newest_weight

    def _split_rows(self, base: int) -> None:
        rows = self.weight.data
        self.base_rows = torch.nn.Parameter(rows[:base].clone())
        # A layer that no expansion added experts to has no new rows.
        self.register_parameter("weight", torch.nn.Parameter(rows[base:].clone()) if base < len(rows) else None)
        weight: Any
        for weight in self.parameters():
            weight.sequence_parallel = self.config.sequence_parallel

    @override
    def reset_parameters(self) -> None:
        """Leave the fp32 weights as they are: they come from the checkpoint."""
        self.weight.sequence_parallel = self.config.sequence_parallel

    @override
    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "LPRRouter":
        super()._apply(fn, recurse)
        for weight in self.parameters():
            weight.data = weight.data.float()
        return self

    @override
    def gating(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Router logits in fp32, [..., experts] of [..., hidden] in any dtype, and the input for the experts: what
        takes its gradient to this product first."""
        rows = self.weight
        if self.base_rows is not None:
            rows = self.base_rows if rows is None else torch.cat((self.base_rows, rows))
        logits, hidden_states = RouterProduct.apply(input, rows)
        # An input that takes no gradient must not become one that does.
        return logits, hidden_states if input.requires_grad else input

    @override
    def forward(
        self, hidden_states: torch.Tensor, token_tags: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route tokens.

        Args:
            hidden_states: [sequence / TP, batch, hidden].
            token_tags: [sequence / TP, batch, 4] (`model.token_tags`); None: neither losses nor statistics.

        Returns:
            Weights [tokens, experts], fp32, zero where not chosen; choices [tokens, experts], bool; the hidden states,
            which the experts are to be given (`gating`).
        """
        logits, hidden_states = self.gating(hidden_states)
        logits_TE = self._weigh_newest(logits.view(-1, self.num_experts))
        # Activation recompute runs the layer twice, the first time without gradients: count once.
        if token_tags is None or (self.training and not torch.is_grad_enabled()):
            return *self.routing(logits_TE.unsqueeze(1)), hidden_states
        tags_T4 = token_tags.reshape(-1, token_tags.shape[-1])
        losses = self._losses(logits_TE, tags_T4)
        attached_TE = logits_TE if losses is None else AttachedLosses.apply(logits_TE, tags_T4, losses)
        weights_TE, choices_TE = self.routing(attached_TE.unsqueeze(1))
        counts = self.counts_in_training or not self.training
        balances = losses is not None and losses.load_balancing_coeff > 0
        if counts or balances:
            load_E = self._load(choices_TE, tags_T4)
            if losses and balances:
                losses.load = load_E
            if counts:
                self._record(logits_TE, choices_TE, tags_T4, load_E)
        return weights_TE, choices_TE, hidden_states

    def _weigh_newest(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """Add log(newest_weight) to the logits of the latest expansion's experts: exp(logit) times the weight."""
        if self.newest_weight == 1.0:
            return logits_TE
        shift_E = torch.zeros(self.num_experts, device=logits_TE.device)
        shift_E[self.num_earlier :] = math.log(self.newest_weight) if self.newest_weight else -math.inf
        return logits_TE + shift_E

    @property
    def num_original(self) -> int:
        """Original experts, which come first: 1, or those of a mixture base."""
        return self.group_ends[0] if self.group_ends else 1

    def _allowed(self, tags_T4: torch.Tensor) -> torch.Tensor | None:
        """Number of experts of each token's language group and the groups before it, [tokens]; of a token of the latest
        group any number, since its weight in the LPR loss is 0."""
        if self.group_ends is None:
            return None
        # The host waits for the device when it copies numbers there: one copy for all steps.
        if self._group_ends is None or self._group_ends.device != tags_T4.device:
            self._group_ends = torch.tensor(self.group_ends, device=tags_T4.device)
        return self._group_ends[tags_T4[:, GROUP].long()]

    def _load(self, choices_TE: torch.Tensor, tags_T4: torch.Tensor) -> torch.Tensor:
        """Share of the micro-batch's tokens that chose each expert, [experts]; sequence parallelism splits them."""
        load_E = tags_T4[:, SHARE] @ choices_TE.to(tags_T4.dtype)
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(load_E, group=self.tp_cp_group)
        return load_E

    def _losses(self, logits_TE: torch.Tensor, tags_T4: torch.Tensor) -> RouterLosses | None:
        """The losses of this micro-batch; None where nothing trains or no loss has a coefficient."""
        config = self.config
        coefficients = (
            config.load_balancing_coeff / config.num_moe_layers,
            config.lpr_loss_coeff / config.num_moe_layers,
        )
        if not self.training or not logits_TE.requires_grad or not any(coefficients):
            return None
        if self.weight is None:  # Only a mixture base's own experts: nothing to balance or to learn.
            return None
        allowed_T = self._allowed(tags_T4) if config.lpr_loss_coeff else None
        compiled = config.transformer_impl == "transformer_engine"
        return RouterLosses(*coefficients, config.lpr_loss_form, allowed_T, compiled=compiled)

    @torch.no_grad()
    def _record(
        self, logits_TE: torch.Tensor, choices_TE: torch.Tensor, tags_T4: torch.Tensor, load_E: torch.Tensor
    ) -> None:
        """Add this micro-batch to the statistics, of which each rank counts its part under sequence parallelism."""
        probabilities_TE = torch.softmax(logits_TE, dim=-1)
        original_T = probabilities_TE[:, 0]
        if self.num_original > 1:  # A single expert needs no sum, which would be a launch.
            original_T = probabilities_TE[:, : self.num_original].sum(dim=1)
        self.statistics.add(
            original=(tags_T4[:, PRIOR] > 0) & (tags_T4[:, GROUP] == 0),
            valid=tags_T4[:, SHARE] > 0,
            probability=original_T,
            likelihood=lpr_negative_log_likelihood(logits_TE, self.config.lpr_loss_form, self._allowed(tags_T4)),
            choices=choices_TE,
            original_experts=self.num_original,
            load_balancing=load_balancing_loss(tags_T4[:, SHARE] @ probabilities_TE, load_E),
            micro_batches=1.0 / self.tp_cp_group.size(),
        )
