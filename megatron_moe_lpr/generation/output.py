"""What the user sees: text on standard output as it comes, and nothing else there."""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Sequence

from megatron_moe_lpr.generation.continuing import Continuation
from megatron_moe_lpr.generation.streaming import TextStream
from megatron_moe_lpr.generation.tokens import PromptTokenizer


def write_utf8() -> None:
    """Let standard output and input be UTF-8 whatever the locale says: a text has characters of any language."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stdin, "strict")):
        with contextlib.suppress(AttributeError, ValueError):  # replaced by a test, or closed
            stream.reconfigure(encoding="utf-8", errors=errors)  # type: ignore[union-attr]


class StreamedText:
    """Writes the continuation of one prompt to standard output, token by token."""

    def __init__(self, tokenizer: PromptTokenizer, prompt: Sequence[int]) -> None:
        self._stream = TextStream(tokenizer.decode, prompt)
        self._ends_line = False

    def on_token(self, number: int, token: int) -> None:
        """Write the text that a token completes."""
        self._write(self._stream.push(token))

    def finish(self) -> None:
        """Write what is left, and end the line."""
        self._write(self._stream.finish())
        if not self._ends_line:
            print(flush=True)

    def _write(self, piece: str) -> None:
        if piece:
            self._ends_line = piece.endswith("\n")
            print(piece, end="", flush=True)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model added to a prompt."""

    text: str
    tokens: int
    """Number of tokens, without the one that ended the text."""
    finish_reason: str
    """stop: a token that ends a text; length: the most tokens, or the model's positions."""


def decoded(tokenizer: PromptTokenizer, prompt: Sequence[int], found: Continuation) -> Answer:
    """Return a continuation as text."""
    stream = TextStream(tokenizer.decode, prompt)
    text = "".join([*map(stream.push, found.tokens), stream.finish()])
    return Answer(text, len(found.tokens), "stop" if found.ended else "length")


def print_records(answers: Sequence[Answer]) -> None:
    """Print a JSON line for each prompt, in their order: `text`, `tokens` and `finish_reason`."""
    for one in answers:
        print(json.dumps(dataclasses.asdict(one), ensure_ascii=False), flush=True)


class Speed:
    """Measures the time to the first token and the tokens a second after it."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._first: float | None = None

    def on_token(self) -> None:
        """Note that a token came."""
        self._first = self._first or time.perf_counter()

    def line(self, prompt_tokens: int, tokens: int) -> str:
        """Return a line about the whole work."""
        end = time.perf_counter()
        first = end if self._first is None else self._first
        rate = f", {(tokens - 1) / (end - first):,.1f} tokens/s after the first" if tokens > 1 and end > first else ""
        return (
            f"{tokens:,} tokens in {end - self._begin:.2f} s: the first of {prompt_tokens:,} tokens of prompt after "
            f"{first - self._begin:.2f} s{rate}"
        )
