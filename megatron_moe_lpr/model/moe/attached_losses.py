"""The router's losses, attached to its logits: a gradient that the backward pass adds to theirs."""

import dataclasses
from typing import Any

import torch
from megatron.core.jit import jit_fuser
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
    compiled: bool = False
    """Whether torch compiles the gradients to one kernel."""


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
        add = add_loss_gradients_compiled if losses.compiled else add_loss_gradients
        settings = losses.load_balancing_coeff, losses.lpr_coeff, losses.lpr_form
        gradient_TE = add(gradient_TE, logits_TE, tags_T4, scale, losses.load, losses.allowed, *settings)
        return gradient_TE, None, None


def add_loss_gradients(
    gradient_TE: torch.Tensor,
    logits_TE: torch.Tensor,
    tags_T4: torch.Tensor,
    scale: torch.Tensor,
    load_E: torch.Tensor | None,
    allowed_T: torch.Tensor | None,
    load_balancing_coeff: float,
    lpr_coeff: float,
    lpr_form: LPRLossForm,
) -> torch.Tensor:
    """Add the gradients of the losses to that of the logits, [tokens, experts].

    Args:
        tags_T4: [tokens, 4] (`token_tags.py`).
        scale: [1], scale of the main loss.
        load_E, allowed_T: as in `RouterLosses`.
    """
    probabilities_TE = torch.softmax(logits_TE, dim=-1)
    if load_E is not None:
        weights_T = tags_T4[:, MICRO_BATCH]
        balance_TE = load_balancing_gradient(probabilities_TE, load_E * scale, weights_T, load_balancing_coeff)
        gradient_TE = gradient_TE + balance_TE
    if lpr_coeff:
        lpr_TE = lpr_gradient(logits_TE, probabilities_TE, lpr_form, allowed_T)
        gradient_TE = torch.addcmul(gradient_TE, lpr_TE, tags_T4[:, PRIOR, None] * scale, value=lpr_coeff)
    return gradient_TE


add_loss_gradients_compiled = jit_fuser(add_loss_gradients)
"""The same in one kernel on a GPU, compiled at the first call, as Megatron compiles its SwiGLU."""
