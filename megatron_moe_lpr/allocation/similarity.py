"""How alike two groups of languages are in a layer (LayerMoE, arXiv 2505.22582, section 3.1)."""

import itertools
from collections.abc import Mapping, Sequence

import torch


def mean_unit_vector(inputs: torch.Tensor) -> torch.Tensor:
    """Mean of the rows, each brought to length 1.

    The mean cosine of all pairs of tokens of two languages is the product of their two mean unit vectors, so that
    neither the tokens nor the matrix of their cosines need be kept.

    Args:
        inputs: [..., hidden], what enters the FFN.

    Returns:
        [hidden], fp64.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    return torch.nn.functional.normalize(rows.double(), dim=-1).mean(dim=0)


def layer_similarity(means: Mapping[str, torch.Tensor], original: Sequence[str]) -> float:
    """S_i: the mean of (mean over pairs of expanded languages, mean over pairs expanded x original).

    With a single expanded language there is no pair of them: the second mean alone.

    Args:
        means: `mean_unit_vector` of each language in one layer.
        original: those of the languages that the dense model knows.
    """
    expanded = [name for name in means if name not in original]
    among = [float(means[one] @ means[other]) for one, other in itertools.combinations(expanded, 2)]
    across = [float(means[one] @ means[other]) for one in expanded for other in original]
    parts = [sum(pairs) / len(pairs) for pairs in (among, across) if pairs]
    return sum(parts) / len(parts)
