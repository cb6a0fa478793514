"""How well could a router tell the original languages from the expanded ones in a layer?

A router is a linear function of what enters the FFN, without a constant. This fits the best one (logistic regression)
and counts how often its sign is right on other text: about what Language Priors Routing can reach in that layer.
"""

from collections.abc import Collection, Mapping, Sequence

import torch


def separating_direction(positive: Sequence[torch.Tensor], negative: Sequence[torch.Tensor]) -> torch.Tensor:
    """The direction [hidden] of logistic regression without a constant.

    Args:
        positive, negative: [windows, length, hidden] of each language of the two groups.
    """
    inputs = torch.cat([part.flatten(0, 1) for part in (*positive, *negative)])
    labels = torch.cat([torch.ones(part[..., 0].numel()) for part in positive])
    labels = torch.cat([labels, torch.zeros(len(inputs) - len(labels))]).to(inputs.device)
    direction = torch.zeros(inputs.shape[1], requires_grad=True, device=inputs.device)
    optimizer = torch.optim.LBFGS([direction], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(inputs @ direction, labels)
        value = value + 1e-5 * direction.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return direction.detach()


def right_side(
    direction: torch.Tensor, inputs: Mapping[str, torch.Tensor], original: Collection[str]
) -> dict[str, torch.Tensor]:
    """Which tokens lie on their group's side, bool [windows, length] by language."""
    return {name: (part @ direction > 0) == (name in original) for name, part in inputs.items()}


def separability(inputs: Mapping[str, torch.Tensor], original: Collection[str]) -> float:
    """Share of tokens on the right side, mean over languages: fitted on every other window, counted on the rest.

    Args:
        inputs: fp32 [windows, length, hidden] of each language, at least 2 windows.
    """
    direction = separating_direction(
        [part[::2] for name, part in inputs.items() if name in original],
        [part[::2] for name, part in inputs.items() if name not in original],
    )
    right = right_side(direction, {name: part[1::2] for name, part in inputs.items()}, original)
    return sum(part.float().mean().item() for part in right.values()) / len(right)
