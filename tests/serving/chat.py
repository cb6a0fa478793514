"""A grafted model behind vLLM's chat endpoint, against transformers on the text that the chat template writes."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.serving import models, servers
from tests.serving.reference import Continuation, continue_greedily

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
CONVERSATIONS = (
    [{"role": "user", "content": "How do I print a page?"}],
    [
        {"role": "user", "content": "Άνοιγμα αρχείου"},
        {"role": "assistant", "content": "Open a file."},
        {"role": "user", "content": "Guardar como"},
    ],
)
BASE = models.Served("Qwen2", "qwen2", {})


def make(root: Path) -> Path:
    """Graft an instruct model onto a trained checkpoint and export it; return the export."""
    models.make(BASE, root)
    instruct = root / "instruct"
    model = AutoModelForCausalLM.from_pretrained(root / "dense")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(instruct)
    for file in (root / "dense").glob("tokenizer*"):
        shutil.copyfile(file, instruct / file.name)
    (instruct / "chat_template.jinja").write_text(TEMPLATE)
    given = ("--load", root / "checkpoint", "--base", root / "dense", "--instruct", instruct)
    models.convert("graft", *given, "--save", root / "grafted")
    models.convert("export", "--load", root / "grafted", "--hf", root / "chat")
    return root / "chat"


def by_transformers(export: Path) -> list[Continuation]:
    """Greedy tokens after each conversation."""
    tokenizer = AutoTokenizer.from_pretrained(export)
    texts = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in CONVERSATIONS]
    return continue_greedily(export, [tokenizer(text, add_special_tokens=False).input_ids for text in texts])


def by_vllm(environment: Path, export: Path) -> list[Continuation]:
    """All conversations at once through /v1/chat/completions."""
    command = servers.vllm_command(environment, export)
    log = export.parent / "chat.log"
    with servers.serving(command, log, servers.VLLM_ENVIRONMENT) as address, ThreadPoolExecutor() as pool:
        return list(pool.map(lambda messages: servers.chat_by_vllm(address, messages), CONVERSATIONS))
