"""The router over the original expert and the new ones, with Language Priors Routing."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from megatron_moe_lpr.megatron.overriding import override, overrides_megatron
from megatron_moe_lpr.model.configuration.config import MoELPRConfig
from megatron_moe_lpr.model.moe.losses import load_balancing_loss, lpr_negative_log_likelihood
from megatron_moe_lpr.model.moe.routing_statistics import RoutingStatistics
from megatron_moe_lpr.model.moe.token_tags import GROUP, MICRO_BATCH, PRIOR


class RouterProduct(torch.autograd.Function):
    """Hidden states times router weights, both taken as fp32; backward keeps the hidden states in their own dtype.

    Mirrors moe_utils.py `RouterGatingLinearFunction` without its choice of Transformer Engine's product: version 2.9
    would multiply fp32 weights with bf16 hidden states, which cuBLASLt refuses, and other versions round otherwise.
    """

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[..., hidden] and [experts, hidden] to fp32 [..., experts]."""
        ctx.save_for_backward(hidden_states, weight)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = torch.mm(rows.float(), weight.float().t())
        return logits.view(*hidden_states.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients in the dtypes of the inputs, none for what is frozen."""
        hidden_states, weight = ctx.saved_tensors
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        gradient = gradient.reshape(-1, weight.shape[0])
        of_input = of_weight = None
        if ctx.needs_input_grad[0]:
            of_input = torch.mm(gradient, weight.float()).to(hidden_states.dtype).view(hidden_states.shape)
        if ctx.needs_input_grad[1]:
            of_weight = torch.mm(gradient.t(), rows.float()).to(weight.dtype)
        return of_input, of_weight


@overrides_megatron
class LPRRouter(TopKRouter):
    """Megatron's top-k router with the paper's losses, and weights that stay in fp32 whatever the model is cast to.

    softmax over all experts, top-k and renormalisation over the k is Megatron's top-k-then-softmax
    (`moe_router_pre_softmax=False`) for k of 2 or more.

    The losses are attached to the routing weights by `MoEAuxLossAutoScaler`. Megatron's own load balancing is left
    off: it is normalised by k, summed over layers, and under `calculate_per_token_loss` with sequence parallelism
    scaled by this rank's tokens instead of the micro-batch's (router.py `attach_and_log_load_balancing_loss`).
    """

    def __init__(
        self, config: MoELPRConfig, pg_collection: ProcessGroupCollection | None = None, **options: Any
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **options)
        self.statistics = RoutingStatistics(self.num_experts)
        self.group_ends: list[int] | None = None
        """Experts of groups 0 to g, for each group of languages but the latest; None: the original expert alone."""
        self.openness, self.num_earlier = 1.0, self.num_experts

    def set_groups(self, groups: tuple[int, ...], openness: float) -> None:
        """Say which experts each expansion added.

        Args:
            groups: new experts by expansion, at least two.
            openness: weight of the latest one's in the softmax. At 0 they are not there, and the router computes
                exactly what it did before the expansion; at 1 it is the stock softmax.
        """
        self.group_ends = list(itertools.accumulate((1, *groups[:-1])))
        self._group_ends: torch.Tensor | None = None
        self.num_earlier, self.openness = self.group_ends[-1], openness

    @override
    def reset_parameters(self) -> None:
        """Leave the fp32 weights as they are: they come from the checkpoint."""
        self.weight.sequence_parallel = self.config.sequence_parallel

    @override
    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "LPRRouter":
        super()._apply(fn, recurse)
        self.weight.data = self.weight.data.float()
        return self

    @override
    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Router logits in fp32, [..., experts] of [..., hidden] in any dtype."""
        return RouterProduct.apply(input, self.weight)

    @override
    def forward(
        self, hidden_states: torch.Tensor, token_tags: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route tokens.

        Args:
            hidden_states: [sequence / TP, batch, hidden].
            token_tags: [sequence / TP, batch, 3] (`model.token_tags`); None: neither losses nor statistics.

        Returns:
            Weights [tokens, experts], fp32, zero where not chosen, and choices [tokens, experts], bool.
        """
        logits = self._opened(self.gating(hidden_states).view(-1, self.num_experts))
        weights, choices = self.routing(logits.unsqueeze(1))
        # Activation recompute runs the layer twice, the first time without gradients: count once.
        if token_tags is None or (self.training and not torch.is_grad_enabled()):
            return weights, choices
        tags = token_tags.reshape(-1, token_tags.shape[-1])
        probabilities = torch.softmax(logits, dim=-1)
        likelihood = lpr_negative_log_likelihood(logits, self.config.lpr_loss_form, self._allowed(tags))
        balance = self._load_balancing(probabilities, choices, tags)
        self._record(probabilities, choices, tags, likelihood, balance)
        if self.training:
            weights = self._attach_losses(weights, tags, likelihood, balance)
        return weights, choices

    def _opened(self, logits: torch.Tensor) -> torch.Tensor:
        if self.openness == 1.0:
            return logits
        shift = torch.zeros(self.num_experts, device=logits.device)
        shift[self.num_earlier :] = math.log(self.openness) if self.openness else -math.inf
        return logits + shift

    def _allowed(self, tags: torch.Tensor) -> torch.Tensor | None:
        """Experts of each token's group and those before it, [tokens]; a latest group's token counts nowhere."""
        if self.group_ends is None:
            return None
        # Each copy of a number of the host's makes it wait for the device: one for all steps.
        if self._group_ends is None or self._group_ends.device != tags.device:
            self._group_ends = torch.tensor(self.group_ends, device=tags.device)
        return self._group_ends[tags[:, GROUP].long()]

    def _load_balancing(self, probabilities: torch.Tensor, choices: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
        valid = tags[:, MICRO_BATCH] > 0
        counts = torch.cat(((choices & valid[:, None]).sum(dim=0), valid.sum()[None])).float()
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(counts, group=self.tp_cp_group)
        return load_balancing_loss(probabilities * valid[:, None], counts[:-1], counts[-1])

    def _attach_losses(
        self, weights: torch.Tensor, tags: torch.Tensor, likelihood: torch.Tensor, balance: torch.Tensor
    ) -> torch.Tensor:
        config = self.config
        loss = torch.zeros((), device=weights.device)
        if config.load_balancing_coeff:
            loss = loss + config.load_balancing_coeff * balance * tags[:, MICRO_BATCH].max()
        if config.lpr_loss_coeff:
            loss = loss + config.lpr_loss_coeff * (likelihood * tags[:, PRIOR]).sum()
        if not loss.requires_grad:
            return weights
        return MoEAuxLossAutoScaler.apply(weights, loss / config.num_moe_layers)

    def _record(
        self,
        probabilities: torch.Tensor,
        choices: torch.Tensor,
        tags: torch.Tensor,
        likelihood: torch.Tensor,
        balance: torch.Tensor,
    ) -> None:
        """Under sequence parallelism each rank counts its share of the micro-batch."""
        with torch.no_grad():
            self.statistics.add(
                original=(tags[:, PRIOR] > 0) & (tags[:, GROUP] == 0),
                valid=tags[:, MICRO_BATCH] > 0,
                probability=probabilities[:, 0],
                likelihood=likelihood,
                choices=choices,
                load_balancing=balance,
                micro_batches=1.0 / self.tp_cp_group.size(),
            )
