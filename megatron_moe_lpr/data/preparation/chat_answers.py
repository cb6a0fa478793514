"""Find which characters of a rendered conversation the assistant writes, with or without marks in the template.

Without `{% generation %}` marks, renderings are compared. An answer begins where the rendering of the messages before
it, with the template's generation prompt, ends. It ends behind its last character and the token that ends a turn: a
rendering of the whole conversation with a probe at the end of the answer shows where that is. The whole conversation,
because templates write earlier answers otherwise than the last one (Qwen3 omits their reasoning).
"""

import re
from collections.abc import Callable, Collection
from typing import Any

from megatron_moe_lpr.data.preparation.chat_conversations import Conversation, Message
from megatron_moe_lpr.data.preparation.chat_rendering import (
    ANSWER_BEGINS,
    ANSWER_ENDS,
    PROBE,
    ChatRenderer,
    RenderedConversation,
    Span,
    without_marks,
)
from megatron_moe_lpr.data.preparation.documents import DocumentError

UNCLEAR = "unclear_answers"
_MARKED = re.compile(f"{ANSWER_BEGINS}([^{ANSWER_BEGINS}{ANSWER_ENDS}]*){ANSWER_ENDS}")
_REASONING = re.compile(r"(?:\s*<think>)?(.*?)</think>\s*", re.DOTALL)


class AnswerFinder:
    """Renders conversations and finds the assistant's answers in them.

    Args:
        renderer: applies the chat template.
        tokens: added tokens of the tokenizer, of which one ends a turn in most templates.
    """

    def __init__(self, renderer: ChatRenderer, tokens: Collection[str]) -> None:
        self.renderer = renderer
        ordered = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
        self._tokens = "|".join(map(re.escape, ordered)) or "(?!)"
        # Cohere's templates end the answer by a token and then the turn by the EOS token, at which a server stops.
        eos = renderer.template.special_tokens.get("eos_token")
        self._end_of_turn = re.compile(rf"\s*(?:{self._tokens}){f'(?:{re.escape(eos)})?' if eos else ''}")
        self._writes_prompt: dict[bool, bool] = {}

    def ends_with_token(self, text: str) -> bool:
        """Whether a text ends with an added token, but for white space."""
        return re.search(rf"(?:{self._tokens})\s*\Z", text) is not None

    def find(self, conversation: Conversation) -> RenderedConversation:
        """Render a conversation and find its answers.

        Raises:
            DocumentError: the template refuses the conversation, or it is not clear what the assistant writes.
        """
        text = self.renderer.render(conversation, conversation.messages)
        self._check_calls(conversation)
        if self.renderer.has_marks(conversation):
            spans = self._marked(text, conversation)
        else:
            spans = [self._compared(text, conversation, number) for number in conversation.answers]
        return without_marks(text, spans)

    def _check_calls(self, conversation: Conversation) -> None:
        """Check that the template writes tool calls: of one for models without tools only an empty answer would stay.

        Raises:
            DocumentError: it does not write one.
        """
        messages = conversation.messages
        for number in conversation.answers:
            changed = _probe_call(messages[number]) if messages[number].get("tool_calls") else None
            if changed is None:
                continue
            text = self.renderer.try_render(conversation, [*messages[:number], changed, *messages[number + 1 :]])
            if text is not None and PROBE not in text:
                raise DocumentError(UNCLEAR, f"{self._source}: does not write the tool calls of message {number + 1}")

    def _marked(self, text: str, conversation: Conversation) -> list[Span]:
        spans = [match.span(1) for match in _MARKED.finditer(text)]
        if conversation.first_counted:
            begin = self._begin(text, conversation, conversation.answers[0])
            spans = [span for span in spans if begin is not None and span[0] >= begin]
        if not spans:
            raise DocumentError(UNCLEAR, f"{self._source}: writes no {{% generation %}} block for it")
        return spans

    def _compared(self, text: str, conversation: Conversation, number: int) -> Span:
        begin = self._begin(text, conversation, number)
        end = None if begin is None else self._end(text, conversation, number)
        if begin is None or end is None or end < begin:
            edge = "begins" if begin is None else "ends"
            raise DocumentError(
                UNCLEAR,
                f"{self._source}: where the answer in message {number + 1} {edge} cannot be seen by comparing "
                "renderings; give a template with {% generation %} marks by --chat-template",
            )
        return begin, end

    @property
    def _source(self) -> str:
        return self.renderer.template.source

    def _begin(self, text: str, conversation: Conversation, number: int) -> int | None:
        """Return where the answer in message `number` begins; None if that cannot be seen."""
        before = conversation.messages[:number]
        prompt = self.renderer.try_render(conversation, before, prompt=True)
        if prompt is None:
            return self._begin_of_content(text, conversation, number)
        if text.startswith(prompt):
            if self._has_prompt(conversation, before, prompt):
                return len(prompt)
            # Without a generation prompt the name of the role comes after `prompt`, where the template writes one.
            content = self._begin_of_content(text, conversation, number)
            is_next = content is None or not text[len(prompt) : content].strip()
            return len(prompt) if is_next else content
        begin = self._aligned(text, conversation, number, prompt)
        return self._begin_of_content(text, conversation, number) if begin is None else begin

    def _begin_of_content(self, text: str, conversation: Conversation, number: int) -> int | None:
        """Return where the text of a message begins, behind its reasoning where the template leaves that out."""
        message = conversation.messages[number]
        begin = self._probed(text, conversation, number, _changed(message, 0, lambda part: PROBE + part.lstrip()))
        if begin is not None:
            return begin
        reasoning = _REASONING.match(_first_text(message))
        if reasoning is None:
            return None
        place = reasoning.end()
        changed = _changed(message, 0, lambda part: part[:place] + PROBE + part[place:])
        begin = self._probed(text, conversation, number, changed)
        return None if begin is None or reasoning[1].strip() in text[:begin] else begin

    def _has_prompt(self, conversation: Conversation, before: list[Message], prompt: str) -> bool:
        has_tools = bool(conversation.tools)
        if has_tools not in self._writes_prompt:
            plain = self.renderer.try_render(conversation, before)
            if plain is None:
                return True
            self._writes_prompt[has_tools] = prompt != plain
        return self._writes_prompt[has_tools]

    def _aligned(self, text: str, conversation: Conversation, number: int, prompt: str) -> int | None:
        """Find the end of the generation prompt where the messages before are written otherwise in the whole text.

        What follows the content of the previous message is the same in both.
        """
        previous = _probe_after(conversation.messages[number - 1])
        in_text = self._probed(text, conversation, number - 1, previous)
        changed = self.renderer.try_render(conversation, [*conversation.messages[: number - 1], previous], prompt=True)
        in_prompt = _place(prompt, changed)
        if in_text is None or in_prompt is None or not text.startswith(prompt[in_prompt:], in_text):
            return None
        return in_text + len(prompt) - in_prompt

    def _end(self, text: str, conversation: Conversation, number: int) -> int | None:
        """Return where the answer in message `number` ends, with the token that ends the turn; None if unclear."""
        message = conversation.messages[number]
        if message.get("tool_calls"):
            return self._end_of_calls(text, conversation, number)
        place = self._probed(text, conversation, number, _probe_after(message))
        if place is None:
            return None
        match = self._end_of_turn.match(text, place)
        return match.end() if match else place

    def _end_of_calls(self, text: str, conversation: Conversation, number: int) -> int | None:
        """As `_end`, for a message with tool calls: in the conversation up to it, its last added token ends it."""
        messages = conversation.messages[: number + 1]
        changed = _probe_call(messages[number])
        place = None if changed is None else self._probed(text, conversation, number, changed)
        whole = self.renderer.try_render(conversation, messages)
        if changed is None or place is None or whole is None:
            return None
        in_whole = _place(whole, self.renderer.try_render(conversation, [*messages[:number], changed]))
        if in_whole is None:
            return None
        rest = whole[in_whole:]
        ends = [match.end() for match in re.finditer(self._tokens, rest)]
        rest = rest[: ends[-1]] if ends else rest.rstrip()
        return place + len(rest) if text.startswith(rest, place) else None

    def _probed(self, text: str, conversation: Conversation, number: int, changed: Message) -> int | None:
        """Return where the probe in a changed message would stand in the text."""
        messages = [*conversation.messages[:number], changed, *conversation.messages[number + 1 :]]
        return _place(text, self.renderer.try_render(conversation, messages))


def _place(text: str, probed: str | None) -> int | None:
    """Return the place of the probe in `probed`, up to which both texts are the same; None if they are not."""
    place = -1 if probed is None else probed.find(PROBE)
    return place if probed is not None and place >= 0 and text.startswith(probed[:place]) else None


def _probe_after(message: Message) -> Message:
    """Return the message with a probe behind its text. White space goes: templates may remove it."""
    return _changed(message, -1, lambda text: text.rstrip() + PROBE)


def _first_text(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else content[0]["text"]


def _changed(message: Message, part: int, change: Callable[[str], str]) -> Message:
    """Return the message with its text changed, or that of one part of a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return {**message, "content": change(content)}
    parts = list(content)
    parts[part] = {**parts[part], "text": change(parts[part]["text"])}
    return {**message, "content": parts}


def _probe_call(message: Message) -> Message | None:
    """Return the message with a probe behind the name of its last tool call; None if that has no name."""
    *calls, last = message["tool_calls"]
    holder = _called(last)
    name = holder.get("name")
    if not isinstance(name, str):
        return None
    changed = {**holder, "name": name + PROBE}
    last = changed if holder is last else {**last, "function": changed}
    return {**message, "tool_calls": [*calls, last]}


def _called(call: dict[str, Any]) -> dict[str, Any]:
    """Return the object with the name of a tool call: its `function`, or the call itself."""
    function = call.get("function")
    return function if isinstance(function, dict) else call
