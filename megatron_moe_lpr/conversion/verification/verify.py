"""Compare two models on the same tokens: logits, and where they differ the residual stream after every layer."""

import dataclasses
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Logits and residual stream of a model."""

    logits: torch.Tensor
    """[batch, sequence, vocabulary], without padding."""
    layers: list[torch.Tensor]
    """The residual stream after each layer, [batch, sequence, hidden]."""
    new_token_mass: float | None = None
    """Mean probability of the tokens that `logits` leaves out, those of vocabulary extensions; None: it has all."""


Forward = Callable[[torch.Tensor], Outputs]
"""From tokens, int64 [batch, sequence], to outputs."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Differences between the outputs of two models."""

    logits: float
    """Largest absolute difference of any logit."""
    layers: list[float]
    """Largest absolute difference of the residual stream, by layer."""
    scale: list[float]
    """Largest absolute value of the reference's residual stream, by layer."""
    same_choice: float
    """Fraction of positions with the same most likely token."""
    new_token_mass: float | None = None
    """Mean probability that our model gives to new tokens, which the reference lacks; None: it lacks none."""

    def agrees(self, tolerance: float) -> bool:
        """Logits differ by no more than `tolerance`; NaN never agrees."""
        return self.logits <= tolerance


@torch.no_grad()
def compare(reference: Forward, ours: Forward, tokens: torch.Tensor) -> Comparison:
    """Compare both models' outputs on `tokens`, int64 [batch, sequence]."""
    expected, found = reference(tokens), ours(tokens)
    pairs = list(zip(expected.layers, found.layers, strict=True))
    return Comparison(
        logits=_distance(expected.logits, found.logits),
        layers=[_distance(*pair) for pair in pairs],
        scale=[expected.float().abs().max().item() for expected, _ in pairs],
        same_choice=(expected.logits.argmax(-1) == found.logits.argmax(-1)).float().mean().item(),
        new_token_mass=found.new_token_mass,
    )


def random_tokens(vocab_size: int, batch: int, sequence: int, seed: int = 1234) -> torch.Tensor:
    """Random tokens, int64 [batch, sequence]; the same for the same arguments."""
    return torch.randint(0, vocab_size, (batch, sequence), generator=torch.Generator().manual_seed(seed))


def print_comparison(comparison: Comparison, tolerance: float, console: Console | None = None) -> None:
    """Print one line, and where the models differ a line for each layer."""
    console = console or Console()
    verdict = "agree" if comparison.agrees(tolerance) else "DIFFER"
    console.print(
        f"logits {verdict}: largest difference {comparison.logits:.3g} (tolerance {tolerance:g}), "
        f"same most likely token at {comparison.same_choice:.2%} of the positions"
    )
    if comparison.new_token_mass is not None:
        console.print(f"mass on new tokens: {comparison.new_token_mass:.3g} of the probability, in text without them")
    if comparison.agrees(tolerance):
        return
    table = Table("layer", "largest difference", "largest value", title="residual stream after each layer")
    for layer, (difference, scale) in enumerate(zip(comparison.layers, comparison.scale, strict=True)):
        table.add_row(str(layer), f"{difference:.3g}", f"{scale:.3g}")
    console.print(table)


def _distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first.float() - second.float().to(first.device)).abs().max().item()
