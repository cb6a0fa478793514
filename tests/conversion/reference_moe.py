"""A plain PyTorch mixture of experts, put in the place of a dense model's feed-forward layers."""

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class PlainExperts(nn.Module):
    """softmax over all experts in float32, the k largest, renormalised, weighted sum of the experts' outputs."""

    def __init__(self, router: torch.Tensor, experts: list[dict[str, torch.Tensor]], top_k: int) -> None:
        super().__init__()
        self.router, self.experts, self.top_k = router, experts, top_k

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        probabilities = functional.linear(states.float(), self.router.float()).softmax(-1)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        total = torch.zeros_like(states)
        for index, expert in enumerate(self.experts):
            hidden = functional.silu(states @ expert["gate_proj"].T) * (states @ expert["up_proj"].T)
            share = (weights * (chosen == index)).sum(-1, keepdim=True)
            total += share * (hidden @ expert["down_proj"].T)
        return total


def dense_expert(model: PreTrainedModel, layer: int) -> dict[str, torch.Tensor]:
    """The weights of a dense model's feed-forward layer."""
    mlp = model.model.layers[layer].mlp
    return {name: getattr(mlp, name).weight.detach() for name in PROJECTIONS}


def random_experts(model: PreTrainedModel, layer: int, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """`count` experts of the right shapes with random weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: weight.shape for name, weight in dense_expert(model, layer).items()}
    return [
        {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(count)
    ]
