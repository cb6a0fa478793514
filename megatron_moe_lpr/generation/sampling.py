"""The next token, from logits: the most likely one, or drawn."""

import torch

from megatron_moe_lpr.generation.options import SamplingOptions


def choose_token(logits: torch.Tensor, options: SamplingOptions, generator: torch.Generator) -> int:
    """Choose a token as transformers' `generate` does: temperature, then top-k, then top-p, then a draw.

    Args:
        logits: fp32 [token ids], on the CPU.
        generator: of the text that the token continues; not used by greedy choice.
    """
    if options.greedy:
        return int(logits.argmax())
    probabilities = filtered(logits, options).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def filtered(logits: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Return the logits divided by the temperature, -inf for tokens that top-k or top-p leave out."""
    scores = logits / (1.0 if options.temperature is None else options.temperature)
    if options.top_k and options.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(options.top_k).values[-1], -torch.inf)
    if options.top_p and options.top_p < 1.0:
        ordered, tokens = scores.sort()
        # Cumulated from the least likely token on; the most likely one always stays.
        left_out = ordered.softmax(-1).cumsum(-1) <= 1.0 - options.top_p
        left_out[-1] = False
        scores = scores.masked_fill(torch.zeros_like(left_out).scatter(0, tokens, left_out), -torch.inf)
    return scores
