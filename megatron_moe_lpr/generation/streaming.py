"""Text from tokens that come one at a time."""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are not yet a whole character."""
CONTEXT = 6
"""Tokens of the prompt that are decoded too: some tokenizers write the first token of a text without its space."""


class TextStream:
    """Decodes the continuation of a prompt piece by piece; the pieces together are the text of all its tokens."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()) -> None:
        """Begin a continuation.

        Args:
            decode: returns the text of token ids.
            prompt: token ids before the continuation.
        """
        self._decode = decode
        self._tokens = list(prompt[-CONTEXT:])
        self._begin, self._shown = 0, len(self._tokens)

    def push(self, token: int) -> str:
        """Return the text that a token completes; empty while a character is not whole."""
        self._tokens.append(token)
        text = self._rest()
        if not text or text.endswith(UNFINISHED):
            return ""
        # The tokens shown last stay as the context of the next ones.
        self._begin, self._shown = self._shown, len(self._tokens)
        return text

    def finish(self) -> str:
        """Return what is left, with replacement characters for bytes that never became a character."""
        text = self._rest()
        self._begin = self._shown = len(self._tokens)
        return text

    def _rest(self) -> str:
        before = self._decode(self._tokens[self._begin : self._shown])
        return self._decode(self._tokens[self._begin :])[len(before) :]
