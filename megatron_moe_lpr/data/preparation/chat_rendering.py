"""Write a conversation as one text, by transformers and the chat template.

Characters that no text has, Unicode's noncharacters, mark places in the text: where `{% generation %}` blocks begin and
end, and where a message mentions a special token. `Marks` are removed again before the text is tokenized.
"""

import bisect
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_moe_lpr.data.chat_template import ChatTemplate
from megatron_moe_lpr.data.preparation.chat_conversations import Conversation, Message
from megatron_moe_lpr.data.preparation.documents import DocumentError
from megatron_moe_lpr.data.special_tokens import SpecialTokenSearch
from megatron_moe_lpr.errors import UserError

ANSWER_BEGINS, ANSWER_ENDS, MENTION_BEGINS, MENTION_ENDS, PROBE = "\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4"
MARKS = (ANSWER_BEGINS, ANSWER_ENDS, MENTION_BEGINS, MENTION_ENDS, PROBE)
_ANY_MARK = re.compile(f"[{''.join(MARKS)}]")
_GENERATION = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")
_END_GENERATION = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")
REFUSED = "refused_by_template"


class ChatRenderer:
    """Applies a chat template to messages."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template

    def has_marks(self, conversation: Conversation) -> bool:
        """Whether the template marks the assistant's texts by `{% generation %}`."""
        return _GENERATION.search(self.template.text(bool(conversation.tools))) is not None

    def render(self, conversation: Conversation, messages: Sequence[Message], prompt: bool = False) -> str:
        """Return the text of some messages, with marks.

        Args:
            conversation: gives the template its tools and variables.
            messages: the messages.
            prompt: end with what begins an answer of the assistant (add_generation_prompt).

        Raises:
            DocumentError: the template refuses them.
        """
        text = _with_answer_marks(self.template.text(bool(conversation.tools)))
        variables = {**self.template.special_tokens, **conversation.variables}
        try:
            return self._tokenizer.apply_chat_template(
                list(messages),
                tools=conversation.tools,
                chat_template=text,
                add_generation_prompt=prompt,
                tokenize=False,
                **variables,
            )
        except ImportError:
            raise
        except Exception as error:  # Templates raise TemplateError, and any error of Python for unexpected values.
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise DocumentError(REFUSED, f"the chat template refuses it ({reason})") from None

    def try_render(self, conversation: Conversation, messages: Sequence[Message], prompt: bool = False) -> str | None:
        """Return `render`'s text, or None if the template refuses these messages or there are none."""
        try:
            return self.render(conversation, messages, prompt) if messages else None
        except DocumentError:
            return None

    def check(self) -> None:
        """Check that the template is one of Jinja's. Raises UserError."""
        from jinja2 import TemplateSyntaxError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols])
        for text in self.template.texts.values():
            try:
                environment.parse(_with_answer_marks(text))
            except TemplateSyntaxError as error:
                raise UserError(
                    f"{self.template.source}: not a chat template: line {error.lineno}: {error.message}"
                ) from None

    @functools.cached_property
    def _tokenizer(self) -> Any:
        """A tokenizer without tokens: transformers renders by a method of tokenizers, and the text alone is used."""
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))


@functools.cache
def _with_answer_marks(template: str) -> str:
    """Return the template with each `{% generation %}` block written between two marks.

    Each tag becomes two of `if` with the mark between them, so that white space beside the tag is treated as before.
    """
    begin, end = f"{{{{ '{ANSWER_BEGINS}' }}}}", f"{{{{ '{ANSWER_ENDS}' }}}}"
    text = _GENERATION.sub(rf"{{%\1 if true %}}{begin}{{% if true \2%}}", template)
    return _END_GENERATION.sub(rf"{{%\1 endif %}}{end}{{% endif \2%}}", text)


def mark_mentions(value: Any, search: SpecialTokenSearch) -> Any:
    """Return a JSON value with marks around the special tokens that its texts mention, and without other marks."""
    if isinstance(value, str):
        return search.surround(_ANY_MARK.sub("\ufffd", value), MENTION_BEGINS, MENTION_ENDS)
    if isinstance(value, dict):
        return {name: mark_mentions(part, search) for name, part in value.items()}
    if isinstance(value, list):
        return [mark_mentions(part, search) for part in value]
    return value


def texts_in(value: Any) -> Iterator[str]:
    """Yield the texts in a JSON value, without the names of its objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_in(part)


def without_any_mark(text: str) -> str:
    """Return a text without marks."""
    return _ANY_MARK.sub("", text)


Span = tuple[int, int]
"""First character, and the one after the last."""


@dataclasses.dataclass(frozen=True)
class RenderedConversation:
    """The text of a conversation, without marks."""

    text: str
    answers: list[Span]
    """Characters that the assistant writes and that count in the loss."""
    mentions: list[Span]
    """Special tokens that messages mention and that stay text."""


def without_marks(marked: str, answers: Sequence[Span]) -> RenderedConversation:
    """Remove all marks from a text.

    Args:
        marked: the text.
        answers: spans of it, which are moved along.
    """
    places = [match.start() for match in _ANY_MARK.finditer(marked)]
    if not places:
        return RenderedConversation(marked, list(answers), [])

    def moved(place: int) -> int:
        return place - bisect.bisect_left(places, place)

    pairs = re.finditer(f"{MENTION_BEGINS}[^{MENTION_BEGINS}{MENTION_ENDS}]*{MENTION_ENDS}", marked)
    mentions = [(moved(pair.start()), moved(pair.end())) for pair in pairs]
    spans = [(moved(first), moved(end)) for first, end in answers]
    return RenderedConversation(without_any_mark(marked), spans, mentions)
