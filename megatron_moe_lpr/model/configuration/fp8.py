"""FP8 arithmetic on NVIDIA GPUs: the flags, and their requirements on model, layout and device."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from packaging.version import Version

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_marks import Acceptable, Decides
from megatron_moe_lpr.flag_ranges import NonNegativeInt
from megatron_moe_lpr.model.configuration.architecture import Architecture
from megatron_moe_lpr.model.configuration.parameters import describe_layer
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import GPUFacts, Platform

if TYPE_CHECKING:
    import torch

FP8Format = Literal["hybrid", "e4m3"]
FP8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]


@dataclasses.dataclass(frozen=True)
class RecipeNeeds:
    """Requirements of a recipe on the machine and on the shapes of matrices."""

    capability: tuple[int, int]
    """Lowest compute capability of a device."""
    transformer_engine: str
    """First version of Transformer Engine that has it."""
    alignment: int
    """Every dimension of a matrix product must be a multiple of it."""
    gathered_alignment: int
    """Alignment of activations that sequence parallelism gathers in FP8 (Transformer Engine `is_quantizable`)."""
    cuda: tuple[int, int] = (12, 1)
    """First version of CUDA that has its matrix products."""


RECIPES: dict[FP8Recipe, RecipeNeeds] = {
    "delayed": RecipeNeeds((8, 9), "2.1", alignment=16, gathered_alignment=16),
    "tensorwise": RecipeNeeds((8, 9), "2.2", alignment=16, gathered_alignment=16),
    "blockwise": RecipeNeeds((9, 0), "2.3", alignment=16, gathered_alignment=128, cuda=(12, 9)),
    "mxfp8": RecipeNeeds((10, 0), "2.1", alignment=32, gathered_alignment=32, cuda=(12, 8)),
}


# Recipes that scale a weight by its own values. Under `delayed` a weight keeps the scale that it was built with:
# Transformer Engine makes new scale tensors when the layer first computes in FP8, and the weight still refers to the
# old ones.
PARAMETERS_IN_FP8: tuple[FP8Recipe, ...] = ("tensorwise", "blockwise")
PARAMETERS_NOT_IN_FP8: dict[FP8Recipe, str] = {
    "delayed": "a weight would keep the scale that it was built with",
    "mxfp8": "weights in MXFP8 were never emulated, and nothing shows that frozen experts would keep their bits",
}
"""Why not, by recipe."""


@dataclasses.dataclass(frozen=True)
class FP8Options:
    """Matrix products in FP8. The router, embeddings, the output layer, norms and the optimizer stay as they are."""

    fp8_format: Acceptable[FP8Format | None] = None
    """hybrid: E4M3 forward, E5M2 for gradients; e4m3: E4M3 throughout. Default: no FP8. Needs --bf16 and a GPU."""
    fp8_recipe: Acceptable[FP8Recipe] = "delayed"
    """How tensors are scaled: by the last steps' largest values, per tensor, per block, or MXFP8 (Blackwell)."""
    fp8_param_gather: Decides[bool] = False
    """Keep the new experts' weights in FP8 and gather these; the optimizer's copies stay fp32, the frozen original
    weights bf16, to the bit."""
    first_last_layers_bf16: Acceptable[bool] = False
    """Compute the first and last layers in bf16; not with the recipe delayed."""
    num_layers_at_start_in_bf16: Acceptable[NonNegativeInt] = 1
    """With --first-last-layers-bf16: how many first layers."""
    num_layers_at_end_in_bf16: Acceptable[NonNegativeInt] = 1
    """With --first-last-layers-bf16: how many last layers."""

    @property
    def enabled(self) -> bool:
        """Whether anything is computed in FP8."""
        return self.fp8_format is not None

    def transformer_fields(self) -> dict[str, Any]:
        """Fields of MoELPRConfig.

        `fp8_param` stays off: it would keep the frozen original weights in FP8 too, and a saved checkpoint would hold
        them rounded. `fp8_new_expert_parameters` is a field of this project for the new experts only.
        """
        if not self.enabled:
            return {}
        return {
            "fp8": self.fp8_format,
            "fp8_recipe": self.fp8_recipe,
            "fp8_new_expert_parameters": self.fp8_param_gather,
            "first_last_layers_bf16": self.first_last_layers_bf16,
            "num_layers_at_start_in_bf16": self.num_layers_at_start_in_bf16,
            "num_layers_at_end_in_bf16": self.num_layers_at_end_in_bf16,
            # Megatron's default of 1 and `most_recent` follow every outlier of a single step.
            **({"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"} if self.fp8_recipe == "delayed" else {}),
        }


def check_fp8_flags(options: FP8Options, dtype: "torch.dtype") -> None:
    """Check the flags against each other.

    Raises:
        UserError: naming the flags that exclude each other.
    """
    if not options.enabled:
        for name in ("fp8_param_gather", "first_last_layers_bf16"):
            if getattr(options, name):
                raise UserError(f"--{name.replace('_', '-')} needs --fp8-format")
        return
    import torch

    if dtype != torch.bfloat16:
        raise UserError(f"--fp8-format needs bf16, and this run computes in {dtype}; add --bf16")
    if options.first_last_layers_bf16 and options.fp8_recipe == "delayed":
        raise UserError(
            "--first-last-layers-bf16: the recipe delayed keeps one history for all layers and cannot leave some out; "
            "choose --fp8-recipe tensorwise or blockwise"
        )
    if options.fp8_param_gather and options.fp8_recipe not in PARAMETERS_IN_FP8:
        raise UserError(
            f"--fp8-param-gather is not supported with --fp8-recipe {options.fp8_recipe}: "
            f"{PARAMETERS_NOT_IN_FP8[options.fp8_recipe]}; leave it out, or choose {' or '.join(PARAMETERS_IN_FP8)}"
        )


def check_fp8_shapes(
    options: FP8Options, architecture: Architecture, layout: ParallelLayout, tokens: int | None = None
) -> None:
    """Check that every matrix product of a rank has dimensions FP8 can compute.

    Args:
        tokens: tokens of a micro-batch, micro-batch size times sequence length; None: not known here.

    Raises:
        UserError: naming the dimension and the alignment.
    """
    if not options.enabled:
        return
    _check_bf16_layers(options, architecture.num_layers // layout.pipeline_model_parallel_size)
    needs, recipe = RECIPES[options.fp8_recipe], options.fp8_recipe
    for what, size in _dimensions(architecture, layout).items():
        _aligned(size, needs.alignment, what, recipe)
    gathers = layout.uses_sequence_parallel
    alignment = needs.gathered_alignment if gathers else needs.alignment
    if gathers:
        _aligned(architecture.hidden_size, alignment, "the hidden size, gathered by sequence parallelism", recipe)
    if tokens is not None:
        tokens //= layout.context_parallel_size
        share = tokens // layout.tensor_model_parallel_size if gathers else tokens
        _aligned(share, alignment, "--micro-batch-size x --seq-length of a rank", recipe)


def row_alignment(recipe: FP8Recipe, sequence_parallel: bool) -> int:
    """The number of rows of an FP8 linear layer's input must be a multiple of this."""
    needs = RECIPES[recipe]
    return needs.gathered_alignment if sequence_parallel else needs.alignment


def check_fp8_device(options: FP8Options, platform: Platform) -> None:
    """Check that the platform can compute the recipe.

    Raises:
        UserError: naming what is too old and what is needed.
    """
    if not options.enabled:
        return
    if platform.gpu is None:
        raise UserError(f"--fp8-format needs NVIDIA GPUs, and this run is on --platform {platform.name}")
    if platform.gpu.transformer_engine is None:
        raise UserError(
            "--fp8-format needs the layers of Transformer Engine, and this run has --transformer-impl local, given or "
            "because Transformer Engine is not installed; leave --fp8-format out"
        )
    _check_gpu(options.fp8_recipe, platform.gpu, platform.gpu.transformer_engine)


def _check_gpu(recipe: FP8Recipe, gpu: GPUFacts, engine: Version) -> None:
    needs = RECIPES[recipe]
    if gpu.capability < needs.capability:
        fitting = [name for name, other in RECIPES.items() if gpu.capability >= other.capability]
        hint = f"choose --fp8-recipe {' or '.join(fitting)}" if fitting else "leave --fp8-format out"
        raise UserError(
            f"--fp8-recipe {recipe} needs compute capability {_dotted(needs.capability)}, "
            f"and this device has {_dotted(gpu.capability)}; {hint}"
        )
    if recipe == "mxfp8" and gpu.capability >= (12, 0):
        raise UserError("--fp8-recipe mxfp8: Transformer Engine has no MXFP8 for compute capability 12; choose another")
    if engine < Version(needs.transformer_engine):
        raise UserError(
            f"--fp8-recipe {recipe} needs Transformer Engine {needs.transformer_engine}, and {engine} is installed"
        )
    if gpu.cuda < needs.cuda:
        raise UserError(
            f"--fp8-recipe {recipe} needs CUDA {_dotted(needs.cuda)}, and PyTorch was built for {_dotted(gpu.cuda)}"
        )


def _check_bf16_layers(options: FP8Options, rank_layers: int) -> None:
    if not options.first_last_layers_bf16:
        return
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        count = getattr(options, name)
        if not 0 <= count <= rank_layers:
            raise UserError(
                f"--{name.replace('_', '-')} {count}: must be between 0 and the {rank_layers} layers of a pipeline rank"
            )


def _dimensions(architecture: Architecture, layout: ParallelLayout) -> dict[str, int]:
    """Columns and rows of a rank's matrices in a layer with experts; a dense FFN has the original expert's shapes."""
    parameters = [*describe_layer(architecture, experts=2), *describe_layer(architecture, experts=3, base=2)]
    shapes = {parameter.name: parameter.rank_shape(layout) for parameter in parameters}
    shared = shapes.get("mlp.shared_experts.linear_fc2.weight")
    return ({"FFN columns of the shared expert on a rank": shared[1]} if shared else {}) | {
        "the hidden size": architecture.hidden_size,
        "attention heads x head dimension of a rank": shapes["self_attention.linear_proj.weight"][1],
        "query, key and value rows of a rank": shapes["self_attention.linear_qkv.weight"][0],
        "FFN columns of a rank": shapes["mlp.original_expert.linear_fc2.weight"][1],
        "FFN columns of a new expert on a rank": shapes["mlp.experts.linear_fc2.weight"][1],
    }


def _aligned(size: int, alignment: int, what: str, recipe: str) -> None:
    if size % alignment:
        raise UserError(
            f"--fp8-recipe {recipe}: {what} is {size}, not a multiple of {alignment}; "
            "change the layout or the recipe, or leave --fp8-format out"
        )


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
