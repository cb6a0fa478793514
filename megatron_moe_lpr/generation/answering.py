"""Continue prompts from flags, files and standard input, or hold a conversation in a terminal."""

import queue
import sys
import threading
from typing import Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.generation.continuing import Continuation, TextModel
from megatron_moe_lpr.generation.options import GenerationOptions, SamplingOptions
from megatron_moe_lpr.generation.output import Answer, Speed, StreamedText, decoded, print_records
from megatron_moe_lpr.generation.prompts import Request, is_interactive, read_requests
from megatron_moe_lpr.liveness import advance
from megatron_moe_lpr.parallel.every_rank import on_rank_0

POLL_SECONDS = 2.0
"""Seconds after which the ranks meet although the user has not finished a line."""
END, WAITING = ("end", ""), ("waiting", "")


def answer(model: TextModel, options: GenerationOptions, show: bool = True) -> list[Answer]:
    """Continue all prompts. Every rank must call it.

    Args:
        show: rank 0 prints.

    Returns:
        What was added to each prompt, on every rank; nothing for a conversation.

    Raises:
        UserError: a prompt cannot be read, or is longer than the model's positions.
    """
    if show and on_rank_0(lambda: is_interactive(options.prompts)):
        model.load()
        _converse(model, options.sampling)
        return []
    prompts, ends = on_rank_0(lambda: _encoded(model, read_requests(options.prompts)))
    model.load()
    streamed = options.prompts.prompts is None
    return _continue(model, prompts, ends, options.sampling, streamed, show)


def _encoded(model: TextModel, requests: list[Request]) -> tuple[list[list[int]], frozenset[int]]:
    """Token ids of all prompts, and the ids that end their continuations."""
    assert model.tokenizer is not None
    prompts = [model.tokenizer.encode(request) for request in requests]
    for prompt, request in zip(prompts, requests, strict=True):
        model.check_length(prompt, request.place)
    return prompts, model.tokenizer.ends(any(request.messages is not None for request in requests))


def _continue(
    model: TextModel,
    prompts: list[list[int]],
    ends: frozenset[int],
    sampling: SamplingOptions,
    streamed: bool = True,
    show: bool = True,
) -> list[Answer]:
    """Continue prompts; with `show` print one as it comes (`streamed`), or all as JSON lines."""
    speed, tokenizer = Speed(), model.tokenizer if show else None
    stream = StreamedText(tokenizer, prompts[0]) if tokenizer and streamed else None

    def on_token(number: int, token: int) -> None:
        speed.on_token()
        if stream:
            stream.on_token(number, token)

    found = model.generate(prompts, sampling, ends, on_token)
    answers = on_rank_0(lambda: _decoded(model, prompts, found))
    if tokenizer:
        stream.finish() if stream else print_records(answers)
        line = speed.line(sum(map(len, prompts)), sum(one.tokens for one in answers))
        print(line, file=sys.stderr, flush=True)
    return answers


def _decoded(model: TextModel, prompts: list[list[int]], found: list[Continuation]) -> list[Answer]:
    assert model.tokenizer is not None
    return [decoded(model.tokenizer, prompt, one) for prompt, one in zip(prompts, found, strict=True)]


def _converse(model: TextModel, sampling: SamplingOptions) -> None:
    """Answer what the user types, line by line, until Ctrl-D."""
    reader = _LineReader() if model.tokenizer else None
    messages: list[dict[str, Any]] = []
    while (line := _next_line(reader)) is not None:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        prompts, ends = on_rank_0(lambda: _encoded(model, [Request("the conversation", messages=messages)]))
        (found,) = _continue(model, prompts, ends, sampling)
        messages.append({"role": "assistant", "content": found.text})


def _next_line(reader: "_LineReader | None") -> str | None:
    """The user's next line, on every rank; None at the end of input.

    The ranks meet every few seconds, since a collective that waits for a user would run into its time-out.
    """
    while True:
        kind, text = on_rank_0(lambda: reader.poll() if reader else END)
        advance()
        if (kind, text) == END:
            return None
        if (kind, text) != WAITING:
            return text


class _LineReader:
    """Reads lines of standard input in a thread of its own."""

    def __init__(self) -> None:
        self._lines: queue.Queue[tuple[str, str]] = queue.Queue()
        self._is_waiting = False
        threading.Thread(target=self._read, daemon=True).start()

    def poll(self) -> tuple[str, str]:
        """Return the next line, `WAITING` if there is none yet, or `END`. Raises UserError: it is not UTF-8."""
        if not self._is_waiting:
            print("> ", end="", file=sys.stderr, flush=True)
            self._is_waiting = True
        try:
            found = self._lines.get(timeout=POLL_SECONDS)
        except queue.Empty:
            return WAITING
        self._is_waiting = False
        if found[0] == "error":
            raise UserError(found[1])
        return found

    def _read(self) -> None:
        try:
            for line in sys.stdin:
                self._lines.put(("line", line.rstrip("\r\n")))
            self._lines.put(END)
        except UnicodeDecodeError:
            self._lines.put(("error", "standard input: not a text in UTF-8"))
        except (OSError, ValueError):  # the terminal is closed
            self._lines.put(END)
