"""What lm_eval puts before every prompt: a BOS token where the model's tokenizer does so itself."""

import re
from pathlib import Path

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.program import command

TURNED_OFF = re.compile(r"(^|,)\s*add_bos_token\s*=\s*(false|0)\s*(,|$)", re.IGNORECASE)


def prompt_beginning(base: Path, final: Path, model_args: str) -> list[str]:
    """Tokens before every prompt of both models; empty: none, as in training data.

    lm_eval 0.4.13 encodes as the tokenizer is set, unless its `add_bos_token` says otherwise
    (`lm_eval.models.huggingface.HFLM.tok_encode`).

    Args:
        base: Hugging Face directory of the dense model.
        final: that of the export.
        model_args: lm_eval's flag.

    Raises:
        UserError: a tokenizer cannot be read, or the two begin differently, so that their scores cannot be compared.
    """
    if TURNED_OFF.search(model_args):
        return []
    first, second = _tokens_added(base), _tokens_added(final)
    if first != second:
        raise UserError(
            f"--base {base} begins prompts with {_shown(first)}, --final {final} with {_shown(second)}; their scores "
            "cannot be compared: give both the same tokenizer files, or add add_bos_token=False to --model-args"
        )
    return first


def describe_beginning(tokens: list[str]) -> str:
    """For people, beside the list of tasks."""
    if not tokens:
        return "prompts begin with no special token, as the training data's documents do"
    return (
        f"prompts begin with {_shown(tokens)}, as the tokenizer is set; training data and {command('evaluate')} have "
        "none (--model-args dtype=auto,add_bos_token=False leaves it out here too)"
    )


def _tokens_added(directory: Path) -> list[str]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{directory}: lm_eval could not load its tokenizer: {error}") from None
    return [str(token) for token in tokenizer.convert_ids_to_tokens(tokenizer.encode(""))]


def _shown(tokens: list[str]) -> str:
    return " ".join(tokens) or "no special token"
