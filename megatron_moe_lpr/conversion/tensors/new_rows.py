"""Rows of the embedding and the output layer for the tokens that a vocabulary extension adds."""

import itertools
from collections.abc import Iterator, Sequence

import torch

CHUNK = 256
"""New rows that are computed at a time, which bounds the memory of their float32 sums."""
OUTPUT_MEAN, OUTPUT_CENTROID = 0.5, 2.0
"""Weights of the two terms of an output row; docs/vocabulary.md compares others."""


def initial_rows(matrix: torch.Tensor, pieces: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows of new tokens in an embedding: each the mean of the rows of the old tokens that it replaces.

    Args:
        matrix: rows of the old tokens, [old tokens, hidden]; it is read row by row.
        pieces: by new token the ids of the old tokens that it replaces.

    Returns:
        [new tokens, hidden] in the dtype of `matrix`; means are computed in float32 and rounded once.
    """
    return torch.cat([mean.to(matrix.dtype) for mean in _means(matrix, pieces)])


def initial_output_rows(matrix: torch.Tensor, pieces: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows of new tokens in an output layer that is not tied to the embedding.

    Half the mean of the old tokens' rows, plus twice the mean of all rows. The latter points away from the hidden
    states, since training pushes the rows of all tokens that do not come next away from them: it keeps the probability
    of new tokens small in text without them, at the same loss in text with them.

    Args:
        matrix: rows of the old tokens, [old tokens, hidden].
        pieces: by new token the ids of the old tokens that it replaces.

    Returns:
        [new tokens, hidden] in the dtype of `matrix`, computed in float32 and rounded once.
    """
    return mixed_rows(matrix, pieces, OUTPUT_MEAN, OUTPUT_CENTROID)


def mixed_rows(
    matrix: torch.Tensor, pieces: Sequence[Sequence[int]], mean_weight: float, centroid_weight: float
) -> torch.Tensor:
    """For each new token a weighted sum of its pieces' mean row and of all rows' mean, see `initial_output_rows`."""
    total = torch.zeros(matrix.shape[1], dtype=torch.float32)
    for chunk in matrix.split(CHUNK):
        total += chunk.float().sum(dim=0)
    centroid = centroid_weight * total / len(matrix)
    return torch.cat([(mean_weight * mean + centroid).to(matrix.dtype) for mean in _means(matrix, pieces)])


class RowDifferences:
    """How post-training changed the rows of tokens: of the base model's own, and of those that extensions added."""

    def __init__(self, base: torch.Tensor, instruct: torch.Tensor) -> None:
        """`base` and `instruct` are the same matrix of two models, [tokens, hidden]."""
        self.base, self.instruct = base, instruct
        self.added: list[torch.Tensor] = []

    def extend(self, pieces: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the differences of an extension's rows, each the mean of those of the tokens that it replaces.

        Args:
            pieces: by new token their ids, of which some may belong to extensions before this one.

        Returns:
            [new tokens, hidden] float32, which further extensions may name.
        """
        parts = []
        for start in range(0, len(pieces), CHUNK):
            chunk = pieces[start : start + CHUNK]
            rows = self._rows(torch.tensor(list(itertools.chain.from_iterable(chunk))))
            parts.append(torch.segment_reduce(rows, "mean", lengths=torch.tensor([len(ids) for ids in chunk])))
        self.added.append(torch.cat(parts))
        return self.added[-1]

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        is_old = ids < len(self.base)
        rows = torch.empty(len(ids), self.base.shape[1])
        rows[is_old] = self.instruct[ids[is_old]].float() - self.base[ids[is_old]].float()
        if not is_old.all():
            rows[~is_old] = torch.cat(self.added)[ids[~is_old] - len(self.base)]
        return rows


def _means(matrix: torch.Tensor, pieces: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    """Means of the rows of each new token's pieces, float32, in chunks of new tokens."""
    for start in range(0, len(pieces), CHUNK):
        chunk = pieces[start : start + CHUNK]
        lengths = torch.tensor([len(ids) for ids in chunk])
        rows = matrix[torch.tensor(list(itertools.chain.from_iterable(chunk)))].float()
        yield torch.segment_reduce(rows, "mean", lengths=lengths)
