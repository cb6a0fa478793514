"""When questions go through a chat template."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_moe_lpr.commands.benchmarks import Flags, harness_settings
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.lm_eval.chat import describe_template, uses_template
from megatron_moe_lpr.evaluation.lm_eval.harness import harness_command
from megatron_moe_lpr.evaluation.lm_eval.tasks import ChosenTasks
from tests.data.builders import EOD_TOKEN, make_hf_tokenizer

TEMPLATES = {
    "ChatML": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "Llama 3": "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}",
    "Mistral": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    " {{ m.content }}<|im_end|>{% endif %}{% endfor %}",
}


def make_model(directory: Path, template: str | None, ends: list[int] | None) -> Path:
    """A tokenizer with 801 tokens, of which 800 is <|im_end|> and 0 the end of a text, and generation settings."""
    make_hf_tokenizer(directory)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    tokenizer["added_tokens"].append({"id": 800, "content": "<|im_end|>"} | flags)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"eos_token": EOD_TOKEN, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": 0}))
    if ends is not None:
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return directory


@pytest.mark.parametrize("name", TEMPLATES)
def test_instruct_models_end_at_the_templates_token_and_base_models_that_carry_one_do_not(name, tmp_path):
    instruct = make_model(tmp_path / "instruct", TEMPLATES[name], [0, 800])
    carries = make_model(tmp_path / "carries", TEMPLATES[name], [0])
    both, base = {"base": instruct, "final": instruct}, {"base": carries, "final": carries}
    assert uses_template(both, "auto") and not uses_template(both, "off")
    assert not uses_template(base, "auto") and uses_template(base, "on")
    assert "go through" in describe_template(both, "auto", True)
    assert "base models that carry one" in describe_template(base, "auto", False)
    with pytest.raises(UserError, match=r"--final .*instruct is an instruct model and --base .*carries is none"):
        uses_template({"base": carries, "final": instruct}, "auto")
    # Without generation settings config.json decides.
    shutil.copytree(carries, tmp_path / "bare")
    (tmp_path / "bare" / "generation_config.json").unlink()
    assert not uses_template({"base": tmp_path / "bare", "final": tmp_path / "bare"}, "auto")


def test_models_without_a_template_and_templates_that_refuse(tmp_path):
    bare = make_model(tmp_path / "bare", None, [0, 800])
    models = {"base": bare, "final": bare}
    assert not uses_template(models, "auto") and "without a chat template" in describe_template(models, "auto", False)
    with pytest.raises(UserError, match=r"--base .*bare: has no chat template"):
        uses_template(models, "on")
    refuses = make_model(tmp_path / "refuses", "{{ raise_exception('no') }}", [0, 800])
    assert not uses_template({"base": refuses, "final": refuses}, "auto")


def test_flags_of_the_harness():
    """Whole sentences are compared without a template; without one there are no further settings."""
    flags = Flags(Path("a"), Path("b"), ["en"], ["el"], Path("out"), num_fewshot=3, fewshot_as_multiturn=False)
    tasks = {name: ChosenTasks(name, {"el": f"{name}_el"}, []) for name in ("mmlu", "multiblimp", "include")}
    asked = harness_command(["lm_eval"], harness_settings(flags, "base", tasks["mmlu"], chat=True), Path("out"))
    assert "--apply_chat_template --fewshot_as_multiturn false --output_path" in " ".join(asked)
    for name, chat in (("mmlu", False), ("multiblimp", True)):
        assert (
            not {"apply_chat_template", "fewshot_as_multiturn"}
            & harness_settings(flags, "base", tasks[name], chat).keys()
        )
    shots = {name: harness_settings(flags, "base", one)["num_fewshot"] for name, one in tasks.items()}
    assert shots == {"mmlu": 3, "multiblimp": 0, "include": 0}
