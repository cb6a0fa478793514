"""Which experts of a mixture a sample of text uses most, layer by layer: new experts may begin as copies of these."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from megatron_moe_lpr.allocation.ffn_inputs import ffn_inputs
from megatron_moe_lpr.allocation.mixture_source import MixtureSource
from megatron_moe_lpr.allocation.sample_options import SampleOptions
from megatron_moe_lpr.allocation.samples import sample_windows
from megatron_moe_lpr.conversion.added_experts import format_experts, most_used
from megatron_moe_lpr.data.reading.blend import read_blend
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.platform.devices import visible_device

LONGEST_WINDOW = 256
"""Tokens of a window of the sample, or fewer where the model has fewer positions."""


def expert_usage(
    source: MixtureSource, windows: Mapping[str, torch.Tensor], device: torch.device
) -> Iterator[torch.Tensor]:
    """Yield for layer 0, 1, ... how many of the sample's tokens choose each expert, [experts]; empty for a dense layer.

    Args:
        windows: token ids [windows, length] of each language, the same length for all.
    """
    for layer, inputs in enumerate(ffn_inputs(source, windows, device)):
        experts = source.mixture.experts[layer]
        if experts == 1:
            yield torch.empty(0)
            continue
        router = source.layer(layer)[source.router]
        chosen = [(one @ router.T).topk(source.mixture.top_k, dim=-1).indices for one in inputs.values()]
        yield torch.bincount(torch.cat([one.flatten() for one in chosen]), minlength=experts)


def most_used_experts(
    source: MixtureSource, counts: Sequence[int], windows: Mapping[str, torch.Tensor], device: torch.device
) -> list[list[int]]:
    """By layer the experts that the sample uses most, one for each new expert of `counts`."""
    usage = expert_usage(source, windows, device)
    return [most_used(one, count) if count else [] for one, count in zip(usage, counts, strict=True)]


def experts_used_most(source: MixtureSource, counts: Sequence[int], options: SampleOptions) -> str:
    """Return the numbers of the mixture's experts that the sample uses most, by layer, as `named_experts` reads them.

    Args:
        counts: new experts of each layer.

    Raises:
        UserError: datasets that cannot be read, too short ones, or tokens that the model does not have.
    """
    length = min(LONGEST_WINDOW, source.architecture.max_position_embeddings)
    flags = "--sample", "--sample-tokens"
    windows = sample_windows(read_blend(options.sample, flags[0]), options.sample_tokens, length, *flags)
    largest = max(int(ids.max()) for ids in windows.values())
    if largest >= source.vocab_size:
        raise UserError(
            f"--sample: has token {largest}, the model {source.vocab_size}; preprocess it with the model's own "
            "tokenizer, since new tokens have no rows yet"
        )
    return format_experts(most_used_experts(source, counts, windows, visible_device()))
