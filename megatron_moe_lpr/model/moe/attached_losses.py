"""The router's losses, attached to the routing weights: a gradient that the backward pass adds to the logits'."""

import dataclasses
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_moe_lpr.model.configuration.config import LPRLossForm
from megatron_moe_lpr.model.moe.losses import load_balancing_gradient, lpr_gradient
from megatron_moe_lpr.model.moe.token_tags import MICRO_BATCH, PRIOR


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """Weights of a layer's losses in the loss that is trained; 0: the loss is not computed."""

    load_balancing: float
    lpr: float
    lpr_form: LPRLossForm


class AttachedLosses(torch.autograd.Function):
    """Return the routing weights as they are; in backward give the logits the losses' gradient.

    Mirrors moe_utils.py `MoEAuxLossAutoScaler`, which multiplies by the scale of the main loss. Unlike there the value
    of a loss is not computed: training needs the gradient alone, and a step that logs computes the values.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weights_TE: torch.Tensor,
        logits_TE: torch.Tensor,
        tags_T4: torch.Tensor,
        load_E: torch.Tensor | None,
        allowed_T: torch.Tensor | None,
        coefficients: Coefficients,
    ) -> torch.Tensor:
        """Keep what backward needs.

        Args:
            load_E: as in `load_balancing_gradient`; None without a coefficient.
            allowed_T: as in `lpr_gradient`.
        """
        ctx.save_for_backward(logits_TE, tags_T4, load_E, allowed_T)
        ctx.coefficients = coefficients
        return weights_TE

    @staticmethod
    def backward(ctx: Any, grad_weights_TE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The weights' gradient unchanged, and the losses' with respect to the logits."""
        logits_TE, tags_T4, load_E, allowed_T = ctx.saved_tensors
        coefficients, scale = ctx.coefficients, MoEAuxLossAutoScaler.main_loss_backward_scale
        probabilities_TE = torch.softmax(logits_TE, dim=-1)
        gradient_TE = None
        if load_E is not None:
            load_E = load_E if scale is None else load_E * scale
            gradient_TE = load_balancing_gradient(
                probabilities_TE, load_E, tags_T4[:, MICRO_BATCH], coefficients.load_balancing
            )
        if coefficients.lpr:
            lpr_TE = lpr_gradient(logits_TE, probabilities_TE, coefficients.lpr_form, allowed_T)
            prior_T1 = tags_T4[:, PRIOR, None] * coefficients.lpr
            prior_T1 = prior_T1 if scale is None else prior_T1 * scale
            gradient_TE = lpr_TE * prior_T1 if gradient_TE is None else gradient_TE.addcmul_(lpr_TE, prior_T1)
        return grad_weights_TE, gradient_TE, None, None, None, None
