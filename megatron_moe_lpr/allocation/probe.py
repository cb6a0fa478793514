"""How well a router could separate original from expanded languages in a layer.

A router is a linear function of the FFN's input, without a constant. The best one is fitted by logistic regression, and
the fraction of other tokens on which its sign is right is about what Language Priors Routing can reach in the layer.
"""

from collections.abc import Collection, Mapping, Sequence

import torch


def separating_direction(positive: Sequence[torch.Tensor], negative: Sequence[torch.Tensor]) -> torch.Tensor:
    """Fit logistic regression without a constant and return its direction, [hidden].

    Args:
        positive, negative: inputs [windows, length, hidden] of each language of the two language groups.
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
    """Whether tokens lie on the side of their language group, bool [windows, length] by language."""
    return {name: (part @ direction > 0) == (name in original) for name, part in inputs.items()}


def separability(inputs: Mapping[str, torch.Tensor], original: Collection[str]) -> float:
    """Fraction of tokens on the right side, mean over languages: fitted on even windows, counted on odd ones.

    Args:
        inputs: fp32 [windows, length, hidden] of each language, at least 2 windows.
    """
    direction = separating_direction(
        [part[::2] for name, part in inputs.items() if name in original],
        [part[::2] for name, part in inputs.items() if name not in original],
    )
    right = right_side(direction, {name: part[1::2] for name, part in inputs.items()}, original)
    return sum(part.float().mean().item() for part in right.values()) / len(right)
