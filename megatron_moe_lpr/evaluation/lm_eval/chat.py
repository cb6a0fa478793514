"""Whether lm_eval puts questions through the models' chat template."""

from pathlib import Path
from typing import Any, Literal

from megatron_moe_lpr.conversion.hugging_face.chat_template import is_trained_on_template
from megatron_moe_lpr.errors import UserError

TemplateChoice = Literal["auto", "on", "off"]


def uses_template(models: dict[str, Path], choice: TemplateChoice) -> bool:
    """Return whether both models are asked through their chat template.

    Args:
        models: Hugging Face directories by the name of their flag.
        choice: auto: if both are instruct models (`is_trained_on_template`).

    Raises:
        UserError: a tokenizer cannot be read, `on` and a model has no template, or `auto` and only one is an instruct
            model, so that scores could not be compared.
    """
    if choice == "off":
        return False
    tokenizers = {name: load_tokenizer(path) for name, path in models.items()}
    if choice == "on":
        for name, tokenizer in tokenizers.items():
            if not tokenizer.chat_template:
                raise UserError(f"--{name} {models[name]}: has no chat template; leave --apply-chat-template on out")
        return True
    trained = {name: is_trained_on_template(models[name], tokenizer) for name, tokenizer in tokenizers.items()}
    if len(set(trained.values())) > 1:
        ones = {found: f"--{name} {models[name]}" for name, found in trained.items()}
        raise UserError(
            f"{ones[True]} is an instruct model and {ones[False]} is none, by generation_config.json; their scores can "
            "be compared only in one form: give --apply-chat-template on or off"
        )
    return all(trained.values())


def describe_template(models: dict[str, Path], choice: TemplateChoice, used: bool) -> str:
    """Return a line for the user about the choice of `uses_template`."""
    if used:
        return "questions go through the models' chat template, but for benchmarks that compare whole sentences"
    if choice == "auto" and any(load_tokenizer(path).chat_template for path in models.values()):
        return (
            "questions are asked without the chat template: by generation_config.json the models are base models that "
            "carry one (--apply-chat-template on uses it)"
        )
    return "questions are asked without a chat template"


def load_tokenizer(directory: Path) -> Any:
    """Load a tokenizer as lm_eval does. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{directory}: lm_eval could not load its tokenizer: {error}") from None
