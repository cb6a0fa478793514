"""What an engine must give: transformers' greedy tokens and log-probabilities, and Megatron's for the same tokens."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_moe_lpr.checkpoint.loading.model import load_model
from megatron_moe_lpr.model.forward import compute_logits
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform

NEW_TOKENS = 96
# Of router logits, whose rounding differs by 1e-6 between engines.
SMALLEST_GAP = 1e-4
ROUTERS = (".mlp.gate", ".block_sparse_moe.router")
"""Ends of the names of routers in transformers' classes."""
PROMPTS = ([17, 301, 45, 902, 77, 512, 8], [640, 33, 214])


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Greedy tokens after a prompt, each with its log-probability, None where an engine does not tell it."""

    tokens: list[int]
    log_probabilities: list[float | None]

    def equal_tokens(self, other: "Continuation") -> int:
        """How many tokens are the same before the first that differs."""
        pairs = zip(self.tokens, other.tokens, strict=False)
        return next(
            (index for index, (one, two) in enumerate(pairs) if one != two), min(len(self.tokens), len(other.tokens))
        )

    def cut(self, length: int, end: int | None = None) -> "Continuation":
        """At most `length` tokens, and of these the ones before the first `end`."""
        length = min(length, self.tokens.index(end) if end in self.tokens else length)
        return Continuation(self.tokens[:length], self.log_probabilities[:length])

    def difference(self, other: "Continuation") -> float:
        """Largest difference of log-probabilities over the tokens that are the same; infinite where it is no number."""
        equal = self.equal_tokens(other)
        pairs = zip(self.log_probabilities[:equal], other.log_probabilities[:equal], strict=True)
        differences = [abs(one - two) for one, two in pairs if one is not None]
        return max(differences) if differences and all(map(math.isfinite, differences)) else math.inf

    def told(self) -> int:
        """How many log-probabilities there are."""
        return sum(number is not None for number in self.log_probabilities)


def by_transformers(directory: Path) -> list[Continuation]:
    """`continue_greedily` for `PROMPTS`."""
    return continue_greedily(directory, PROMPTS)


@torch.no_grad()
def continue_greedily(directory: Path, prompts: Sequence[list[int]]) -> list[Continuation]:
    """Greedy, float32, one prompt at a time, without a cache: every step computes the whole text.

    Raises:
        RuntimeError: a router is so near a tie that a right engine may choose another expert.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    results = [_greedy(lambda tokens: model(tokens, use_cache=False).logits, prompt) for prompt in prompts]
    gap = min(smallest_gap(model, prompt + one.tokens) for prompt, one in zip(prompts, results, strict=True))
    if gap < SMALLEST_GAP:
        raise RuntimeError(f"a router's second and third expert are {gap:.1e} apart: take another random model")
    return results


@torch.no_grad()
def smallest_gap(model: PreTrainedModel, text: list[int]) -> float:
    """How far the second expert's logit is above the third's, at the closest place of the text in any layer.

    Equal experts under a zero router are left out: which of them is chosen makes no difference.
    """
    gaps: list[float] = []

    def look(router: nn.Module, inputs: tuple[torch.Tensor], _: object) -> None:
        if router.weight.any():
            logits = inputs[0].double().flatten(0, -2) @ router.weight.double().T
            best = logits.topk(3).values
            gaps.append(float((best[:, 1] - best[:, 2]).min()))

    routers = [module for name, module in model.named_modules() if name.endswith(ROUTERS)]
    hooks = [router.register_forward_hook(look) for router in routers]
    model(torch.tensor([text]), use_cache=False)
    for hook in hooks:
        hook.remove()
    if not gaps:
        raise RuntimeError("no router was found in the model")
    return min(gaps)


@torch.no_grad()
def by_megatron(checkpoint: Path, continuations: list[Continuation], vocab_size: int) -> list[Continuation]:
    """Megatron's choice and log-probability at every place of the texts that transformers wrote."""
    platform, layout = select_platform("cpu"), ParallelLayout()
    initialize_parallel(platform, layout)
    model = load_model(checkpoint, layout, platform)
    results = []
    for prompt, continuation in zip(PROMPTS, continuations, strict=True):
        text = torch.tensor([prompt + continuation.tokens])
        rows = compute_logits(model.chunks, model.config, text, vocab_size)[0, len(prompt) - 1 : -1].float()
        best = rows.log_softmax(-1).max(-1)
        results.append(Continuation(best.indices.tolist(), best.values.tolist()))
    return results


def _greedy(logits: object, prompt: list[int]) -> Continuation:
    text, chosen = list(prompt), []
    for _ in range(NEW_TOKENS):
        best = logits(torch.tensor([text]))[0, -1].float().log_softmax(-1).max(-1)
        chosen.append(float(best.values))
        text.append(int(best.indices))
    return Continuation(text[len(prompt) :], chosen)
