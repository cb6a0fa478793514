"""The router's losses, attached to its logits: a gradient that the backward pass adds to theirs."""

import dataclasses
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_moe_lpr.model.configuration.config import LPRLossForm
from megatron_moe_lpr.model.moe.losses import load_balancing_gradient, lpr_gradient
from megatron_moe_lpr.model.moe.token_tags import MICRO_BATCH, PRIOR


@dataclasses.dataclass
class RouterLosses:
    """Losses of a micro-batch in a layer: their weights in the loss that is trained, and what their gradients need."""

    load_balancing_coeff: float
    """0: the loss is not computed."""
    lpr_coeff: float
    lpr_form: LPRLossForm
    allowed: torch.Tensor | None = None
    """[tokens], as in `lpr_gradient`."""
    load: torch.Tensor | None = None
    """[experts], as in `load_balancing_gradient`; known when the tokens are routed, before the backward pass."""


class AttachedLosses(torch.autograd.Function):
    """Return the logits as they are; in backward add the losses' gradient to theirs.

    Mirrors moe_utils.py `MoEAuxLossAutoScaler`, which multiplies by the scale of the main loss. Unlike there the value
    of a loss is not computed: training needs the gradient alone, and a step that logs computes the values.
    """

    @staticmethod
    def forward(ctx: Any, logits_TE: torch.Tensor, tags_T4: torch.Tensor, losses: RouterLosses) -> torch.Tensor:
        """Keep what backward needs."""
        ctx.save_for_backward(logits_TE, tags_T4)
        ctx.losses = losses
        return logits_TE

    @staticmethod
    def backward(ctx: Any, gradient_TE: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient through the routing weights and that of the losses."""
        logits_TE, tags_T4 = ctx.saved_tensors
        losses, scale = ctx.losses, MoEAuxLossAutoScaler.main_loss_backward_scale
        if scale is None:
            scale = logits_TE.new_ones(1)
        probabilities_TE = torch.softmax(logits_TE, dim=-1)
        if losses.load is not None:
            load_E, weights_T = losses.load * scale, tags_T4[:, MICRO_BATCH]
            coefficient = losses.load_balancing_coeff
            gradient_TE = gradient_TE + load_balancing_gradient(probabilities_TE, load_E, weights_T, coefficient)
        if losses.lpr_coeff:
            lpr_TE = lpr_gradient(logits_TE, probabilities_TE, losses.lpr_form, losses.allowed)
            prior_T1 = tags_T4[:, PRIOR, None] * scale
            gradient_TE = torch.addcmul(gradient_TE, lpr_TE, prior_T1, value=losses.lpr_coeff)
        return gradient_TE, None, None
