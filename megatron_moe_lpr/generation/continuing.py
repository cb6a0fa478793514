"""The interface of models that continue token ids, and one text while tokens are added to it."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.generation.options import SamplingOptions
from megatron_moe_lpr.generation.tokens import PromptTokenizer

OnToken = Callable[[int, int], None]
"""Called on rank 0 with the number of the prompt and the token that continues it."""


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Tokens that a model added to a prompt."""

    tokens: list[int]
    """Without the token that ends the text."""
    ended: bool
    """Whether such a token came; otherwise the number of tokens or the model's positions ended it."""


class TextModel(ABC):
    """A model that continues token ids. On several ranks every rank calls each method."""

    tokenizer: PromptTokenizer | None
    """On rank 0; None on the other ranks."""
    max_length: int
    """Positions of the model."""

    @abstractmethod
    def load(self) -> None:
        """Load the weights. Raises UserError."""

    @abstractmethod
    def generate(
        self, prompts: Sequence[list[int]], options: SamplingOptions, ends: frozenset[int], on_token: OnToken
    ) -> list[Continuation]:
        """Continue each prompt.

        Args:
            ends: token ids that end a text.
        """

    def check_length(self, prompt: Sequence[int], place: str) -> None:
        """Check that a prompt leaves a position for an answer. Raises UserError."""
        if len(prompt) >= self.max_length:
            raise UserError(
                f"{place}: the prompt has {len(prompt):,} tokens, and the model {self.max_length:,} positions, of "
                "which the answer needs one at least; shorten it"
            )


class ContinuedText:
    """One prompt and what continues it, while tokens are added."""

    def __init__(self, prompt: list[int], most: int, ends: frozenset[int]) -> None:
        """Begin.

        Args:
            most: number of tokens after which the text ends in any case.
        """
        self.prompt, self.added, self.ended = prompt, [], False  # type: tuple[list[int], list[int], bool]
        self._most, self._ends = most, ends

    @property
    def finished(self) -> bool:
        """Whether no token is added any more."""
        return self.ended or len(self.added) >= self._most

    def __len__(self) -> int:
        return len(self.prompt) + len(self.added)

    def add(self, token: int) -> bool:
        """Add a token, unless it ends the text; return whether it was added."""
        self.ended = token in self._ends
        if not self.ended:
            self.added.append(token)
        return not self.ended

    def at(self, first: int, end: int) -> list[int]:
        """Return the tokens of some positions; 0 behind the end of a finished text."""
        tokens = (*self.prompt, *self.added)[first:end]
        return [*tokens, *[0] * (end - first - len(tokens))]

    def result(self) -> Continuation:
        """Return what was added."""
        return Continuation(self.added, self.ended)
