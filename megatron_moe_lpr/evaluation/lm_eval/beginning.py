"""The special tokens that lm_eval puts before every prompt: a BOS token if the model's tokenizer adds one."""

import re
from pathlib import Path

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.lm_eval.chat import load_tokenizer
from megatron_moe_lpr.program import command

BOS_TURNED_OFF = re.compile(r"(^|,)\s*add_bos_token\s*=\s*(false|0)\s*(,|$)", re.IGNORECASE)


def prompt_beginning(base: Path, final: Path, model_args: str) -> list[str]:
    """Return the tokens that lm_eval adds before every prompt of both models; training data has none.

    lm_eval 0.4.13 lets the tokenizer add its tokens unless `add_bos_token` is given
    (`lm_eval.models.huggingface.HFLM.tok_encode`).

    Args:
        base: Hugging Face directory of the dense model.
        final: Hugging Face directory of the export.
        model_args: the flag `--model_args` of lm_eval.

    Raises:
        UserError: a tokenizer cannot be read, or the two add different tokens, so that scores cannot be compared.
    """
    if BOS_TURNED_OFF.search(model_args):
        return []
    first, second = _tokens_added(base), _tokens_added(final)
    if first != second:
        raise UserError(
            f"--base {base} begins prompts with {_shown(first)}, --final {final} with {_shown(second)}; their scores "
            "cannot be compared: give both the same tokenizer files, or add add_bos_token=False to --model-args"
        )
    return first


def describe_beginning(tokens: list[str]) -> str:
    """Return a line for the user about the tokens of `prompt_beginning`."""
    if not tokens:
        return "prompts begin with no special token, as the training data's documents do"
    return (
        f"prompts begin with {_shown(tokens)}, as the tokenizer is set; training data and {command('evaluate')} have "
        "none (--model-args dtype=auto,add_bos_token=False leaves it out here too)"
    )


def _tokens_added(directory: Path) -> list[str]:
    tokenizer = load_tokenizer(directory)
    return [str(token) for token in tokenizer.convert_ids_to_tokens(tokenizer.encode(""))]


def _shown(tokens: list[str]) -> str:
    return " ".join(tokens) or "no special token"
