"""A tiny model with a tokenizer and a chat template, as a checkpoint and exported."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megatron_moe_lpr.generation.checkpoint import open_checkpoint_model
from megatron_moe_lpr.generation.continuing import Continuation
from megatron_moe_lpr.generation.options import ModelOptions, SamplingOptions
from megatron_moe_lpr.parallel.layout import ParallelLayout
from tests.conversion.helpers import perturb, rewrite_checkpoint, run
from tests.conversion.tiny_models import COMMON, save_model
from tests.data.builders import make_hf_tokenizer

VOCABULARY = 800
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROMPTS = [[5, 9, 300], [17, 4, 99, 350, 2, 61, 8], [700, 33, 41, 5, 6, 77, 20], [*range(100, 121)]]
"""Token ids of different lengths, one twice; longer than the sliding window of the tiny Mistral."""


def save_with_tokenizer(name: str, directory: Path, template: str | None = TEMPLATE) -> Path:
    """Save a tiny model of four layers with a byte-level tokenizer whose token 798 ends an answer."""
    before = {field: COMMON[field] for field in ("num_hidden_layers", "vocab_size")}
    COMMON.update(num_hidden_layers=4, vocab_size=VOCABULARY)
    try:
        save_model(name, directory)
    finally:
        COMMON.update(before)
    make_hf_tokenizer(directory)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    tokenizer["model"]["merges"] = [pair for pair in tokenizer["model"]["merges"] if "".join(pair) != last]
    del vocabulary[last]
    token = {"id": VOCABULARY - 1, "content": "<|end|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append(token | flags)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"chat_template": template} if template else {})
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def make_models(root: Path, name: str, experts: int = 5) -> tuple[Path, Path]:
    """Return a checkpoint whose experts differ, and its export."""
    save_with_tokenizer(name, root / "hf")
    run("import", "--hf", root / "hf", "--save", root / "checkpoint", "--num-experts", experts)
    if experts > 1:
        rewrite_checkpoint(root / "checkpoint", perturb)
    run("export", "--load", root / "checkpoint", "--hf", root / "exported")
    return root / "checkpoint", root / "exported"


def continue_prompts(
    load: Path, layout: dict[str, Any], prompts: list[list[int]], ends: frozenset[int] = frozenset(), **sampling: Any
) -> tuple[list[Continuation], list[tuple[int, int]]]:
    """On every rank: the continuations, and what was streamed."""
    options = ModelOptions(load=load, fp32=True, layout=ParallelLayout(**layout), platform="cpu")
    streamed: list[tuple[int, int]] = []
    with open_checkpoint_model(options) as model:
        model.load()
        found = model.generate(
            prompts, SamplingOptions(**sampling), ends, lambda number, token: streamed.append((number, token))
        )
    return found, streamed


def by_transformers(directory: Path, prompts: list[list[int]], count: int, ends: list[int] | None = None):
    """Greedy continuations by transformers' own `generate`, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = 0
    found = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        output = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=count)
        found.append(output[0, len(prompt) :].tolist())
    return found


def tokens(found: list[Continuation]) -> list[list[int]]:
    """Return the token ids of continuations."""
    return [dataclasses.asdict(one)["tokens"] for one in found]
