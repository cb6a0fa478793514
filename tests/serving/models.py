"""Models to serve: random ones of every family, upcycled and perturbed, exported in both forms."""

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conversion.helpers import perturb, rewrite_checkpoint, run

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "data" / "base_model"
WINDOW = 96
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
FIRST_DENSE = "[0,1,1,1]"
ALL = "[1,1,1,1]"


@dataclasses.dataclass(frozen=True)
class Served:
    """One line of the table."""

    name: str
    model_type: str
    fields: dict
    layers: str = ALL


MODELS = (
    Served("Qwen2", "qwen2", {}),
    Served(
        "Qwen2, layer 0 dense, tied, yarn", "qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}, FIRST_DENSE
    ),
    Served("Qwen3", "qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    Served("Qwen3, layer 0 dense", "qwen3", {"head_dim": 64}, FIRST_DENSE),
    Served("Llama, tied, llama3 rope", "llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    Served("Llama, layer 0 dense", "llama", {"rms_norm_eps": 1e-5}, FIRST_DENSE),
    Served(f"Mistral, window {WINDOW}", "mistral", {"head_dim": 64, "sliding_window": WINDOW}, FIRST_DENSE),
)


def make(served: Served, root: Path) -> Path:
    """Write `dense`, `checkpoint`, `stock` and `llama_cpp` below `root` and return it."""
    make_dense(served.model_type, {**SIZES, **served.fields}, root / "dense")
    options = ("--num-experts", 5, "--moe-layer-freq", served.layers)
    run("import", "--hf", root / "dense", "--save", root / "checkpoint", *options)
    rewrite_checkpoint(root / "checkpoint", perturb)
    run("export", "--load", root / "checkpoint", "--hf", root / "stock")
    run("export", "--load", root / "checkpoint", "--hf", root / "llama_cpp", "--for", "llama.cpp")
    return root


def make_dense(model_type: str, fields: dict, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """A random dense model with the demo's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, directory / name)


def write_json(content: object, path: Path) -> None:
    """One JSON file."""
    path.write_text(json.dumps(content))
