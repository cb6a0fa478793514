"""The columns of the logits of a model whose vocabulary was extended."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class VocabularyLayout:
    """Which TP rank holds which token's row: each rank has a part of the base model's rows and of each extension's.

    A rank's logits have its part of the base model's columns first, then its part of each extension's. The logits of
    all TP ranks side by side are therefore a permutation of the padded vocabulary, not the order of token ids.
    """

    rows: tuple[int, ...]
    """Rows of the base model, then of each extension, the oldest one first."""
    padded: tuple[int, ...]
    """The same with the rows that pad them, multiples of `ranks`."""
    ranks: int
    """TP size."""
    extensions: tuple[int, ...] = ()
    """The numbers of the extensions that have rows, by which their parameters are named; the oldest one's is 0."""

    @property
    def is_extended(self) -> bool:
        """Whether any extension added rows."""
        return len(self.rows) > 1

    @property
    def first_ids(self) -> tuple[int, ...]:
        """The first token id of each part."""
        return tuple(sum(self.rows[:part]) for part in range(len(self.rows)))

    @property
    def rank_rows(self) -> tuple[int, ...]:
        """Rows of each part on a rank, those that pad it included: the columns of the rank's logits."""
        return tuple(padded // self.ranks for padded in self.padded)

    @property
    def rank_columns(self) -> tuple[tuple[int, int], ...]:
        """First column and the one after the last of each part in a rank's logits."""
        rows = self.rank_rows
        return tuple((sum(rows[:part]), sum(rows[: part + 1])) for part in range(len(rows)))

    @property
    def width(self) -> int:
        """Columns of a rank's logits."""
        return sum(self.rank_rows)

    def unpadded(self, part: int, rank: int) -> int:
        """Rows of a part on a rank that belong to a token."""
        rows = self.rank_rows[part]
        return max(0, min(rows, self.rows[part] - rank * rows))

    def columns(self) -> torch.Tensor:
        """The column of each token id in the logits of all ranks side by side, int64 [token ids]."""
        parts = []
        for rows, rank_rows, (first, _) in zip(self.rows, self.rank_rows, self.rank_columns, strict=True):
            row = torch.arange(rows)
            parts.append(row // rank_rows * self.width + first + row % rank_rows)
        return torch.cat(parts)
