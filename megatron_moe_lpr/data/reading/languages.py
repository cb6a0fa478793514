"""Languages as numbers: the tag that every token of a batch carries."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from megatron_moe_lpr.data.language_names import covered

if TYPE_CHECKING:
    import torch

# Tools that only count languages do without torch, which takes a second to import.

PADDING_LANGUAGE = -1
"""The tag of padding, which belongs to no language and counts nowhere."""


class LanguageRegistry:
    """The languages of a run's data, sorted, numbered from 0. The same data gives the same numbers on every rank."""

    def __init__(self, languages: Iterable[str]) -> None:
        self.names: tuple[str, ...] = tuple(sorted(set(languages)))
        self._ids = {name: index for index, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def id(self, name: str) -> int:
        """Number of a language; KeyError where the data has none of that name."""
        return self._ids[name]

    def name(self, language: int) -> str:
        """Name of a number; `padding` for PADDING_LANGUAGE."""
        return "padding" if language == PADDING_LANGUAGE else self.names[language]

    def original_ids(self, names: Iterable[str]) -> frozenset[int]:
        """Numbers of the data's languages that `names` mean; the data need not have them all."""
        return frozenset(self._ids[name] for name in covered(self.names, names))

    def group_table(self, groups: Sequence[Sequence[str]]) -> "torch.Tensor":
        """Int64 [languages + 1]: the group in which a language is named, -1 for the others and for padding.

        Args:
            groups: original languages, then those of each expansion but the latest; the data need not have them all.
        """
        import torch

        table = torch.full((len(self) + 1,), -1)
        for index, names in enumerate(groups):
            for language in self.original_ids(names):
                table[language] = index
        return table

    def original_table(self, names: Sequence[str]) -> "torch.Tensor":
        """Bool [languages + 1]: `table[language]` of a batch's tags says which tokens are of original languages.

        The last entry is that of PADDING_LANGUAGE (-1): False.
        """
        import torch

        table = torch.zeros(len(self) + 1, dtype=torch.bool)
        table[sorted(self.original_ids(names))] = True
        return table
