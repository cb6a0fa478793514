"""Models to serve: random ones of every family, upcycled and perturbed, exported in both forms."""

import contextlib
import dataclasses
import io
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conversion.helpers import perturb, rewrite_checkpoint, run
from tests.data.builders import corpus_texts
from tests.data.extended_tokenizers import extend, learn_merges
from tests.training.test_second_expansion import change_card

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "data" / "base_model"
WINDOW = 48
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
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0, "original_max_position_embeddings": 64}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.0625,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "tie_word_embeddings": True,
}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_experts": 8}
NO_COHERE = ("transformers 4", "llama.cpp")
FIRST_DENSE = "[0,1,1,1]"
ALL = "[1,1,1,1]"


@dataclasses.dataclass(frozen=True)
class Served:
    """One line of the table."""

    name: str
    model_type: str
    fields: dict
    layers: str = ALL
    new_tokens: int = 0
    """Tokens that a vocabulary extension adds."""
    added_experts: int = 0
    """Experts that each layer of a mixture gets; 0: the model is dense and gets five."""
    without: tuple[str, ...] = ()
    """Engines that do not have the architecture, or for which no form of it is known: they are not asked."""
    within_window: tuple[str, ...] = ()
    """Engines with another window than transformers, compared as far as it reaches."""

    @property
    def vocab_size(self) -> int:
        """Token ids of the model."""
        return SIZES["vocab_size"] + self.new_tokens


MODELS = (
    Served("Qwen2", "qwen2", {}),
    Served(
        "Qwen2, layer 0 dense, tied, yarn", "qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}, FIRST_DENSE
    ),
    Served("Qwen3, layer 0 dense", "qwen3", {"head_dim": 64}, FIRST_DENSE),
    Served("Llama, tied, llama3 rope", "llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    Served(
        f"Mistral, window {WINDOW}, layer 0 dense", "mistral", {"head_dim": 64, "sliding_window": WINDOW}, FIRST_DENSE
    ),
    Served("Qwen2, 200 new tokens", "qwen2", {}, new_tokens=200),
    Served("Llama, tied, 200 new tokens", "llama", {"tie_word_embeddings": True}, new_tokens=200),
    Served("Seed-OSS", "seed_oss", {"head_dim": 32}),
    Served("Phi-3, layer 0 dense", "phi3", {}, FIRST_DENSE),
    Served("Granite, tied, 200 new tokens", "granite", GRANITE, new_tokens=200, without=("llama.cpp",)),
    Served("OLMo 2", "olmo2", {}, without=("llama.cpp",)),
    Served(
        "Qwen3-MoE, 4 experts added",
        "qwen3_moe",
        MIXTURE | {"head_dim": 64, "norm_topk_prob": True},
        added_experts=4,
        without=("llama.cpp",),
    ),
    Served(
        "Qwen2-MoE with a shared expert, 4 experts added",
        "qwen2_moe",
        MIXTURE | {"norm_topk_prob": False, "shared_expert_intermediate_size": 64},
        added_experts=4,
        without=("llama.cpp",),
    ),
    Served("Cohere", "cohere", {"logit_scale": 0.25}, without=NO_COHERE),
    Served(
        f"Cohere2, window {WINDOW}",
        "cohere2",
        {"logit_scale": 0.25, "sliding_window": WINDOW},
        without=NO_COHERE,
        # Its layers also see the token just before the window, which transformers' do not.
        within_window=("vLLM",),
    ),
)


def make(served: Served, root: Path) -> Path:
    """Write `dense`, `checkpoint` and `stock` below `root` and return it."""
    make_dense(served.model_type, {**SIZES, **served.fields}, root / "dense")
    options: tuple[object, ...] = ("--num-experts", 5, "--moe-layer-freq", served.layers)
    if served.added_experts:
        options = ("--add-experts", served.added_experts, "--new-experts-from", "random")
    if served.new_tokens:
        merges = learn_merges(TOKENIZER, corpus_texts("valid", "el")[:20], served.new_tokens)
        extend(TOKENIZER, root / "tokenizer", merges, SIZES["vocab_size"], {})
        options = (*options, "--tokenizer", root / "tokenizer")
    convert("import", "--hf", root / "dense", "--save", root / "checkpoint", *options)
    rewrite_checkpoint(root / "checkpoint", train)
    if served.added_experts:
        change_card(root / "checkpoint", openness=1.0)  # as after stage 1
    convert("export", "--load", root / "checkpoint", "--hf", root / "stock")
    return root


def train(tensors: dict[str, torch.Tensor]) -> None:
    """Change what training changes: experts and routers, and rows of new tokens, so that the model chooses some."""
    perturb(tensors)
    generator = torch.Generator().manual_seed(8)
    for key, tensor in tensors.items():
        if ".new_" in key:
            tensors[key] = 0.1 * torch.randn(tensor.shape, generator=generator)


def make_for_llama_cpp(root: Path) -> Path:
    """Write `llama_cpp` beside what `make` wrote."""
    convert("export", "--load", root / "checkpoint", "--hf", root / "llama_cpp", "--for", "llama.cpp")
    return root / "llama_cpp"


def convert(*arguments: object) -> None:
    """Run tools/convert_hf.py; of what it prints only notes and warnings are shown.

    Raises:
        RuntimeError: it refused; the message is its own.
    """
    printed, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            run(*arguments)
    except SystemExit:
        raise RuntimeError(errors.getvalue()) from None
    for line in printed.getvalue().splitlines():
        if line.startswith(("note:", "warning:")):
            print(f"        {line}")


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
