"""Options of an import, and how many experts each layer gets by them."""

import dataclasses
from pathlib import Path

from megatron_moe_lpr.checkpoint.format.card import MAX_EXPERTS, check_experts
from megatron_moe_lpr.conversion.experts_per_layer import FLAG as EXPERTS_FLAG
from megatron_moe_lpr.conversion.experts_per_layer import read_experts_per_layer
from megatron_moe_lpr.conversion.layer_frequency import layers_with_experts
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_ranges import PositiveInt, Seed

PAPER_NUM_EXPERTS = 6
PAPER_TOP_K = 2
ADD_FLAG, FROM_FLAG = "--add-experts", "--new-experts-from"
USED_MOST, RANDOM = "used-most", "random"
"""Values of --new-experts-from beside numbers of experts."""


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """What an import makes of a model: flags of `moe-lpr import`; None: not given."""

    hf: Path
    """Directory with config.json and safetensors weights, a GGUF file, or a name on the hub as Qwen/Qwen1.5-1.8B."""
    num_experts: PositiveInt | None = None
    """Experts per layer, with the original one; 1: stay dense. Default: 6 (paper), or what a MoE or adapter has."""
    top_k: PositiveInt | None = None
    """Experts per token. Default: the paper's 2, or what a MoE or adapter has."""
    moe_layer_freq: str | None = None
    """Layers with experts: N for every N-th from layer 0 on, or a pattern: "[0]+[1]*31". Default: 1, every layer."""
    experts_per_layer: str | None = None
    """Instead: experts of each layer (1: dense), as 5,4,3,... or as the JSON file of `moe-lpr allocate`."""
    expand_blocks: PositiveInt | None = None
    """Stay dense and insert N copied blocks, one after each of N groups, for --stage blocks (LLaMA-Pro)."""
    seed: Seed = 1234
    """Seed of the routers' initial values, and of the choice by --new-experts-from random."""
    adapter: Path | None = None
    """Take experts and routers from an adapter of the authors' implementation (peft_type MOE); --hf is its base."""
    tokenizer: Path | None = None
    """Directory of an extended tokenizer, made by `moe-lpr extend-tokenizer`: its new tokens get rows of their own."""
    allow_top_1: bool = False
    """Accept --top-k 1, although the upcycled model then differs from the dense one."""
    expert_model_parallel_size: PositiveInt = 1
    """Only a check: does this EP size divide the number of new experts?"""
    add_experts: str | None = None
    """For a mixture such as Qwen3-MoE: new experts of every layer that has experts, or of each layer, as in 4,4,0,2.
    All experts of the model itself stay frozen."""
    new_experts_from: str | None = None
    """Which of a mixture's experts the new ones copy: used-most (by the text of --sample), random (by --seed), or their
    numbers, as in 3,17 for all layers or 3,17;0,5;... by layer. Default: used-most with --sample, else random."""
    original_languages: list[str] = dataclasses.field(default_factory=list)
    """For experts that were trained elsewhere (--adapter, a stock MoE): the dense model's languages, as in en es zh."""
    expanded_languages: list[str] = dataclasses.field(default_factory=list)
    """For experts that were trained elsewhere: languages that they were trained on, as in el hu tr."""


def upcycled_experts(options: ImportOptions, num_layers: int) -> tuple[list[int], int]:
    """Experts of each layer of a dense model that is upcycled, the original one included (1: dense), and top-k.

    Raises:
        UserError: the flags contradict each other or do not fit the model.
    """
    if options.experts_per_layer is not None:
        for flag, value in (("--num-experts", options.num_experts), ("--moe-layer-freq", options.moe_layer_freq)):
            if value is not None:
                raise UserError(f"{flag} and {EXPERTS_FLAG}: give one of them")
        experts = read_experts_per_layer(options.experts_per_layer, num_layers)
    else:
        num_experts = PAPER_NUM_EXPERTS if options.num_experts is None else options.num_experts
        if not 1 <= num_experts <= MAX_EXPERTS:
            raise UserError(f"--num-experts {num_experts}: from 1 (the dense model itself) to {MAX_EXPERTS:,}")
        chosen = layers_with_experts(options.moe_layer_freq or "1", num_layers)
        experts = [num_experts if has_experts else 1 for has_experts in chosen]
    default_top_k = PAPER_TOP_K if max(experts) > 1 else 1
    top_k = default_top_k if options.top_k is None else options.top_k
    _check_experts(experts, top_k)
    return experts, top_k


def given_experts(options: ImportOptions, experts: list[int], top_k: int, place: str) -> tuple[list[int], int]:
    """Return what a source with experts has, once it is checked that the options do not contradict it.

    Args:
        experts: experts of each layer of the source.
        top_k: top-k of the source.
        place: the source, for messages.

    Raises:
        UserError: naming the flag that contradicts it.
    """
    if options.num_experts not in (None, max(experts)):
        raise UserError(f"--num-experts {options.num_experts}: {place} has {max(experts)} experts; leave the flag out")
    if options.top_k not in (None, top_k):
        raise UserError(f"--top-k {options.top_k}: {place} was trained with top-k {top_k}; leave the flag out")
    if options.moe_layer_freq is not None:
        raise UserError(f"--moe-layer-freq: {place} says which layers have experts; leave the flag out")
    given = options.experts_per_layer
    if given is not None and read_experts_per_layer(given, len(experts)) != experts:
        raise UserError(f"{EXPERTS_FLAG}: {place} has other numbers of experts; leave the flag out")
    _check_experts(experts, top_k)
    return experts, top_k


def _check_experts(experts: list[int], top_k: int) -> None:
    check_experts(experts, "--num-experts")
    fewest = min({count for count in experts if count > 1}, default=1)
    if top_k < 1 or top_k > fewest:
        raise UserError(f"--top-k {top_k}: must lie between 1 and the number of experts, {fewest}")
