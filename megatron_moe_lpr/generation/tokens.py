"""A model's tokenizer as transformers has it: prompts to token ids, and the tokens that end a text."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_moe_lpr.conversion.hugging_face.chat_template import answer_ends
from megatron_moe_lpr.conversion.hugging_face.exported_tokenizer import settle_tokenizer
from megatron_moe_lpr.conversion.hugging_face.hf_directory import carried_files, carry_files
from megatron_moe_lpr.conversion.hugging_face.quiet import quiet_transformers
from megatron_moe_lpr.data.tokenizer_settings import eos_ids
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.generation.prompts import Request


class PromptTokenizer:
    """Encodes prompts as servers of the exported model do: the tokenizer's own BOS token, its own chat template."""

    def __init__(self, directory: Path, chat_template: Path | None = None, settled: bool = False) -> None:
        """Load the tokenizer of a directory.

        Args:
            chat_template: file of a template to use instead of the tokenizer's.
            settled: the directory is an export or a model of others, which transformers is to read as it is; otherwise
                its tokenizer is brought into the form of an export first.

        Raises:
            UserError: there is no tokenizer, or transformers cannot load it.
        """
        self.directory = directory
        self._tokenizer = _load(directory) if settled else _load_settled(directory)
        self._template = f"the chat template of {directory}"
        if chat_template is not None:
            self._template = f"--chat-template {chat_template}"
            self._tokenizer.chat_template = _read_template(chat_template)

    def encode(self, request: Request) -> list[int]:
        """Return the token ids of a prompt. Raises UserError: it is empty, or the template refuses it."""
        if request.messages is None:
            ids = list(self._tokenizer(request.text).input_ids)
        else:
            ids = list(self._render(request.messages, request.tools, request.place))
        if not ids:
            raise UserError(f"{request.place}: the prompt has no token; give some text")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def ends(self, chat: bool) -> frozenset[int]:
        """Return the token ids that end a text: `eos_token_id` of generation_config.json or else config.json, the
        tokenizer's EOS token, and with `chat` the one that the template puts behind an answer."""
        declared = eos_ids(self.directory)
        found = set(declared[0] if declared else ())
        if self._tokenizer.eos_token_id is not None:
            found.add(self._tokenizer.eos_token_id)
        return frozenset(found | (answer_ends(self._tokenizer) if chat else set()))

    def _render(self, messages: list[dict[str, Any]], tools: list | None, place: str) -> list[int]:
        if not self._tokenizer.chat_template:
            raise UserError(
                f"{self.directory}: its tokenizer has no chat template; give --chat-template FILE, or leave --chat and "
                "messages out"
            )
        messages, continues = _begun_answer(messages, place)
        last = {"continue_final_message": True} if continues else {"add_generation_prompt": True}
        try:
            return self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False, **last)
        except Exception as error:  # templates raise jinja's errors, and Python's where they expect other fields
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{place}: {self._template} refuses it: {reason}") from None


def _load_settled(directory: Path) -> Any:
    with _settled(directory) as copy:
        return _load(copy, directory)


@contextlib.contextmanager
def _settled(directory: Path) -> Iterator[Path]:
    """A copy of a tokenizer's directory in the form in which `moe-lpr export` writes it."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        carry_files(carried_files(directory), copy)
        if (directory / "config.json").is_file():
            (copy / "config.json").write_bytes((directory / "config.json").read_bytes())
        settle_tokenizer(copy)
        yield copy


def _load(directory: Path, shown: Path | None = None) -> Any:
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise UserError(f"{shown or directory}: holds no tokenizer; give --tokenizer DIRECTORY")
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # errors about foreign files have no common base class
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{shown or directory}: transformers cannot load its tokenizer: {reason}") from None


def _read_template(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--chat-template {file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--chat-template {file}: not a text in UTF-8") from None


def _begun_answer(messages: list[dict[str, Any]], place: str) -> tuple[list[dict[str, Any]], bool]:
    """Return the messages to render, and whether the last one is an answer that the model has begun.

    An answer without text is none: its end, where a template removes white space, would lie within the role's header.

    Raises:
        UserError: the model has called a tool and waits for it, or nothing is there to answer.
    """
    last = messages[-1]
    if last.get("role") != "assistant":
        return messages, False
    if last.get("tool_calls"):
        raise UserError(f"{place}: ends with a tool call; add what the tool returned, in a message of the role tool")
    content = last.get("content") or ""
    texts = [content] if isinstance(content, str) else [part.get("text") for part in content if isinstance(part, dict)]
    if any(isinstance(text, str) and text.strip() for text in texts):
        return messages, True
    if len(messages) == 1:
        raise UserError(f"{place}: an empty answer alone; give a message that the model should answer")
    return messages[:-1], False
