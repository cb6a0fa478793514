"""Similarity of expanded and original languages in a layer (LayerMoE, arXiv 2505.22582, section 3.1)."""

import itertools
from collections.abc import Mapping, Sequence

import torch


def mean_unit_vector(inputs: torch.Tensor) -> torch.Tensor:
    """Mean of the rows, each scaled to length 1.

    The mean cosine over all pairs of tokens of two languages is the product of the languages' mean unit vectors, so
    neither tokens nor a matrix of cosines are kept.

    Args:
        inputs: inputs of the FFN, [..., hidden].

    Returns:
        [hidden], fp64.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    return torch.nn.functional.normalize(rows.double(), dim=-1).mean(dim=0)


def layer_similarity(means: Mapping[str, torch.Tensor], original: Sequence[str]) -> float:
    """S_i: the mean of (mean over pairs of expanded languages, mean over pairs expanded x original).

    With a single expanded language, which has no pair, it is the second mean.

    Args:
        means: `mean_unit_vector` of each language in one layer.
        original: names of the original languages.
    """
    expanded = [name for name in means if name not in original]
    among = [float(means[one] @ means[other]) for one, other in itertools.combinations(expanded, 2)]
    across = [float(means[one] @ means[other]) for one in expanded for other in original]
    parts = [sum(pairs) / len(pairs) for pairs in (among, across) if pairs]
    return sum(parts) / len(parts)
