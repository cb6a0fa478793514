"""Activation recompute: what Megatron-Core has of it, said in terms of our flags before it builds a model."""

from collections.abc import Sequence

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.fp8 import FP8Options, FP8Recipe

MODULES = ("core_attn", "moe_act", "layernorm", "mlp", "moe")
"""Megatron-Core's, without those of models that are not ours."""
NOT_DELAYED = ("moe_act", "layernorm")
"""Megatron throws their outputs away and computes them again from operands that delayed scaling does not keep."""


def check_recompute(
    granularity: str | None,
    num_layers: int | None,
    modules: Sequence[str] | None,
    fp8: FP8Options,
    method: str | None = None,
    layers_of_a_chunk: int | None = None,
) -> None:
    """Check the flags of recompute against each other and against FP8 (TransformerConfig.__post_init__).

    Args:
        layers_of_a_chunk: layers that a rank computes one after the other; None: not known here.

    Raises:
        UserError: naming the flag.
    """
    if granularity == "selective":
        if num_layers is not None:
            raise UserError("--recompute-num-layers is of --recompute-granularity full; leave it out")
    elif modules is not None:
        raise UserError("--recompute-modules needs --recompute-granularity selective")
    if granularity == "full" and method != "block" and layers_of_a_chunk and layers_of_a_chunk % (num_layers or 1):
        # Megatron cuts the layers into groups and would look for layers behind the last.
        raise UserError(
            f"--recompute-num-layers {num_layers}: does not divide the {layers_of_a_chunk} layers that a pipeline rank "
            "computes together; choose a divisor, or --recompute-method block"
        )
    unknown = [module for module in modules or () if module not in MODULES]
    if unknown:
        raise UserError(f"--recompute-modules {unknown[0]} is not one of {', '.join(MODULES)}")
    if fp8.enabled:
        check_recompute_in_fp8(modules or (), fp8.fp8_recipe, "--recompute-modules")


def check_recompute_in_fp8(modules: Sequence[str], recipe: FP8Recipe, flag: str) -> None:
    """Check that the recipe keeps what recomputing the modules needs; `flag` names them in the message.

    Raises:
        UserError: naming the first module that does not go with the recipe.
    """
    refused = [module for module in modules if module in NOT_DELAYED]
    if refused and recipe == "delayed":
        raise UserError(
            f"{flag} {refused[0]} does not go with --fp8-recipe delayed; choose tensorwise or blockwise, "
            "or recompute core_attn, mlp or moe"
        )
