"""Tokenize conversations, with a loss mask: which tokens the assistant writes."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from megatron_moe_lpr.data.chat_template import ChatTemplate
from megatron_moe_lpr.data.preparation.chat_answers import UNCLEAR, AnswerFinder
from megatron_moe_lpr.data.preparation.chat_conversations import (
    ASSISTANT,
    KEYS,
    MESSAGES,
    Conversation,
    PromptCompletion,
    read_conversation,
)
from megatron_moe_lpr.data.preparation.chat_rendering import (
    ChatRenderer,
    RenderedConversation,
    Span,
    mark_mentions,
    texts_in,
    without_any_mark,
    without_marks,
)
from megatron_moe_lpr.data.preparation.documents import (
    MALFORMED,
    REPAIRED,
    DocumentError,
    DocumentOptions,
    read_objects,
    replace_surrogates,
)
from megatron_moe_lpr.data.preparation.encoding import (
    EncodedBlock,
    EncodedDocuments,
    EncoderOptions,
    check_vocabulary,
)
from megatron_moe_lpr.data.preparation.sources import Block
from megatron_moe_lpr.data.special_tokens import SpecialTokenSearch
from megatron_moe_lpr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_moe_lpr.errors import UserError


@dataclasses.dataclass(frozen=True)
class EncodedConversation:
    """Token ids of a conversation, whether each counts in the loss (1 or 0), UTF-8 bytes of its text and answers."""

    ids: list[int]
    loss_mask: np.ndarray
    text_bytes: int
    loss_text_bytes: int


class ChatEncoder:
    """Tokenizes blocks of lines that hold conversations, in the calling thread: a `BlockTask`.

    Args:
        tokenizer: recognises special tokens (`split_special_tokens` off), which the template writes.
        options: settings. With `split_special_tokens`, special tokens that messages mention are encoded as text.
        template: the chat template; None: only pairs of texts can be read.
    """

    def __init__(self, tokenizer: Tokenizer, options: EncoderOptions, template: ChatTemplate | None) -> None:
        self.tokenizer, self.options, self.template = tokenizer, options, template
        self._mentions = SpecialTokenSearch(tokenizer.special_tokens)
        tokens = [token.content for token in tokenizer.rust.get_added_tokens_decoder().values()]
        self._finder = AnswerFinder(ChatRenderer(template), tokens) if template else None
        self._special = frozenset(map(tokenizer.token_id, tokenizer.special_tokens))

    @functools.cached_property
    def _plain_tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer.path, self.tokenizer.eod_token)

    def check_template(self) -> None:
        """Check the template on a question and its answer. Raises UserError, with that example, if it is of no use."""
        if self._finder is None:
            return
        self._finder.renderer.check()
        messages = [{"role": "user", "content": "QUESTION"}, {"role": ASSISTANT, "content": "ANSWER"}]
        try:
            self._finder.find(example := Conversation(messages))
        except DocumentError as error:
            # A template may refuse this one, for example because it wants a system message first.
            if error.reason != UNCLEAR:
                return
            text = without_marks(self._finder.renderer.render(example, messages), []).text
            raise UserError(f"{error}; it writes {text!r} for a question and its answer") from None

    def encode(self, block: Block) -> EncodedBlock:
        """Tokenize a block. Raises UserError for a bad line if `stop_on_error` is set, or without a template."""
        counts: Counter[str] = Counter()
        first: dict[str, str] = {}
        options = self.options.documents
        if block.plain_text:
            raise UserError(f"{block.source}: a .txt holds no conversations; --chat reads JSON lines and parquet")
        groups: dict[str, list[EncodedConversation]] = {}

        def convert(document: dict) -> EncodedConversation:
            try:
                return self._encode_object(document, block, counts, first)
            except RecursionError:
                raise DocumentError(MALFORMED, "nested too deeply") from None

        for language, conversation in read_objects(block, options, counts, first, convert):
            groups.setdefault(language, []).append(conversation)
        languages = {language: self._joined(group) for language, group in groups.items()}
        return EncodedBlock(languages, counts, first, block.disk_bytes)

    def _encode_object(
        self, document: dict, block: Block, counts: Counter, first: dict[str, str]
    ) -> EncodedConversation:
        """Tokenize the conversation of a JSON object. Raises DocumentError."""
        key = messages_key(self.options.documents)
        parts = {name: document[name] for name in {key, *KEYS} & document.keys()}
        found = next(filter(None, map(self._mentions.first, texts_in(parts))), None)
        as_text = self.options.split_special_tokens
        marks = self._only_mentioned(document, parts, key) if found and as_text else SpecialTokenSearch(())
        conversation = read_conversation({**document, **mark_mentions(parts, marks)}, key)
        if isinstance(conversation, PromptCompletion):
            begin, text = len(conversation.prompt), conversation.prompt + conversation.completion
            rendered, needs_end = without_marks(text, [(begin, len(text))]), True
        else:
            rendered, needs_end = self._render(conversation)
        if found and (rendered.mentions or not as_text):
            counts[self.options.mention_reason] += 1
            first.setdefault(self.options.mention_reason, f"{block.source}: {found}")
        repaired = replace_surrogates(rendered.text)
        counts[REPAIRED] += repaired is not rendered.text
        return self._encode_text(dataclasses.replace(rendered, text=repaired), needs_end)

    def _only_mentioned(self, document: dict, parts: dict, key: str) -> SpecialTokenSearch:
        """Return a search for the special tokens that messages mention and the template does not look for in them.

        A template that splits answers at `</think>`, a special token of some tokenizers, writes another text where
        marks stand around that token. There it is no mention but part of the conversation's form, and recognised.
        """

        def written(tokens: Collection[str]) -> str | None:
            marked = {**document, **mark_mentions(parts, SpecialTokenSearch(tokens))}
            conversation = read_conversation(marked, key)
            if self._finder is None or isinstance(conversation, PromptCompletion):
                return None
            text = self._finder.renderer.try_render(conversation, conversation.messages)
            return None if text is None else without_any_mark(text)

        tokens, expected = self.tokenizer.special_tokens, written(())
        if written(tokens) == expected:
            return self._mentions
        present = [token for token in tokens if any(token in text for text in texts_in(parts))]
        kept = [token for token in present if written([token]) == expected]
        return SpecialTokenSearch(kept if written(kept) == expected else ())

    def _render(self, conversation: Conversation) -> tuple[RenderedConversation, bool]:
        """Return the rendered conversation, and whether its last answer ends without a token that ends a turn."""
        if self._finder is None:
            raise UserError(
                f"{self.tokenizer.path.parent}: no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); take the tokenizer of an instruct model, or pass --chat-template FILE"
            )
        rendered = self._finder.find(conversation)
        is_answer_last = conversation.messages[-1]["role"] == ASSISTANT
        return rendered, is_answer_last and not self._finder.ends_with_token(rendered.text)

    def _encode_text(self, rendered: RenderedConversation, needs_end: bool) -> EncodedConversation:
        encoded = self.tokenizer.rust.encode(rendered.text, add_special_tokens=False)
        ids = list(encoded.ids)
        offsets = np.array(encoded.offsets, np.int64).reshape(-1, 2)
        mask = overlaps(offsets, rendered.answers, len(rendered.text))
        if rendered.mentions:
            ids, mask = self._mentions_as_text(rendered, ids, offsets, mask)
        if needs_end and self.options.append_eod:
            ids.append(self.tokenizer.eod)
            mask = np.append(mask, True)
        answers = sum(len(rendered.text[begin:end].encode("utf-8")) for begin, end in rendered.answers)
        return EncodedConversation(ids, mask.astype(np.uint8), len(rendered.text.encode("utf-8")), answers)

    def _mentions_as_text(
        self, rendered: RenderedConversation, ids: list[int], offsets: np.ndarray, mask: np.ndarray
    ) -> tuple[list[int], np.ndarray]:
        """Replace each special token that a message only mentions by the tokens of its text."""
        mentioned = overlaps(offsets, rendered.mentions, len(rendered.text))
        text_ids: list[int] = []
        repeats = np.ones(len(ids), np.int64)
        for place, (number, (begin, end)) in enumerate(zip(ids, offsets.tolist(), strict=True)):
            pieces = [number]
            if mentioned[place] and number in self._special:
                pieces = ids_as_text(self._plain_tokenizer, rendered.text[begin:end])
                repeats[place] = len(pieces)
            text_ids += pieces
        return text_ids, np.repeat(mask, repeats)

    def _joined(self, conversations: Sequence[EncodedConversation]) -> EncodedDocuments:
        tokens = np.array([number for one in conversations for number in one.ids], np.int32)
        check_vocabulary(tokens, self.tokenizer, self.options)
        return EncodedDocuments(
            tokens.astype(self.tokenizer.dtype),
            np.array([len(one.ids) for one in conversations], np.int32),
            np.array([one.text_bytes for one in conversations], np.int64),
            np.concatenate([one.loss_mask for one in conversations]),
            np.array([one.loss_text_bytes for one in conversations], np.int64),
        )


def messages_key(options: DocumentOptions) -> str:
    """Return the JSON key of the messages: --json-key, whose default is the key of plain text."""
    return MESSAGES if options.json_key == DocumentOptions.json_key else options.json_key


def overlaps(offsets: np.ndarray, spans: Sequence[Span], length: int) -> np.ndarray:
    """Return whether each token has a character in one of the spans, bool [tokens].

    A token that holds characters before and inside a span overlaps it, as in transformers'
    `apply_chat_template(return_assistant_tokens_mask=True)`.

    Args:
        offsets: first character of each token, and the one after its last, int64 [tokens, 2].
        spans: of characters.
        length: characters of the text.
    """
    inside = np.zeros(length + 1, np.int64)
    for begin, end in spans:
        inside[begin + 1 : end + 1] = 1
    before = np.cumsum(inside)
    return before[offsets[:, 1]] > before[offsets[:, 0]]


def ids_as_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a special token's text, taken as plain text in the middle of a text.

    Args:
        tokenizer: with `split_special_tokens`.
    """
    # Behind another character, because a SentencePiece tokenizer adds a space to the beginning of a text.
    before, whole, alone = tokenizer.encode_batch(["\n", f"\n{text}", text])
    return whole[len(before) :] if whole[: len(before)] == before else alone
