"""What may be drawn, against transformers' own filters."""

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.generation.options import ModelOptions, PromptOptions, SamplingOptions
from megatron_moe_lpr.generation.sampling import choose_token, filtered
from megatron_moe_lpr.parallel.layout import ParallelLayout


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.7, None, None), (None, 5, None), (1.3, None, 0.9), (2.0, 20, 0.6), (1.0, 500, 1e-6)],
)
def test_the_filters_are_transformers(temperature, top_k, top_p):
    logits = 3 * torch.randn(100, generator=torch.Generator().manual_seed(1))
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature or 1.0)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p else []
    expected = warpers(torch.zeros(1, 1, dtype=torch.int64), logits[None].clone())[0]
    assert torch.equal(filtered(logits, options), expected) and not options.greedy
    assert torch.isfinite(expected).any()


def test_draws_follow_the_probabilities():
    logits, generator = torch.tensor([0.5, 0.3, 0.2]).log(), torch.Generator().manual_seed(0)
    options = SamplingOptions(temperature=1.0)
    drawn = torch.tensor([choose_token(logits, options, generator) for _ in range(2000)])
    assert torch.allclose(drawn.bincount() / 2000, torch.tensor([0.5, 0.3, 0.2]), atol=0.04)


def test_one_token_no_temperature_and_no_flag_are_greedy():
    logits, generator = torch.randn(50, generator=torch.Generator().manual_seed(2)), torch.Generator()
    for flags in ({}, {"top_k": 1, "temperature": 5.0}, {"temperature": 0.0, "top_p": 0.9}):
        options = SamplingOptions(**flags)
        assert options.greedy and choose_token(logits, options, generator) == logits.argmax()
    assert not SamplingOptions(top_p=0.5).greedy


def test_flags_that_contradict_each_other():
    for kind, flags, message in (
        (ModelOptions, {}, "give --load CHECKPOINT or --hf DIRECTORY"),
        (ModelOptions, {"load": "a", "hf": "b"}, "one of them"),
        (ModelOptions, {"hf": "b", "layout": ParallelLayout(2)}, "a layout needs --load"),
        (
            ModelOptions,
            {"load": "a", "layout": ParallelLayout(context_parallel_size=2)},
            "--context-parallel-size 2: a",
        ),
        (ModelOptions, {"hf": "b", "bf16": True, "fp32": True}, "--bf16 and --fp32"),
        (PromptOptions, {"prompt": "a", "messages": "b"}, "--prompt and --messages: give one of them"),
    ):
        with pytest.raises(UserError, match=message):
            kind(**flags)
