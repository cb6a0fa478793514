"""The export for llama.cpp computes what the stock export does, in transformers; `make test-serving` runs llama.cpp."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from tests.conversion.helpers import hf_tensors, perturb, rewrite_checkpoint, run
from tests.conversion.tiny_models import load_model, logits, save_model

Dense = Callable[[str], Path]
DEMO = Path(__file__).parents[3] / "data" / "base_model"
FREQUENCIES = ("[1,1,1]", "[0,1,1]")


def export_both(dense: Path, root: Path, frequency: str) -> tuple[Path, Path]:
    checkpoint, stock, form = root / "checkpoint", root / "stock", root / "form"
    run("import", "--hf", dense, "--save", checkpoint, "--num-experts", 3, "--moe-layer-freq", frequency)
    rewrite_checkpoint(checkpoint, perturb)
    run("export", "--load", checkpoint, "--hf", stock)
    run("export", "--load", checkpoint, "--hf", form, "--for", "llama.cpp")
    return stock, form


@pytest.mark.parametrize("frequency", FREQUENCIES)
@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied", "llama3-tied", "mistral-full"])
def test_computes_what_the_stock_form_does(name: str, frequency: str, dense_directory: Dense, tmp_path: Path) -> None:
    stock, form = export_both(dense_directory(name), tmp_path, frequency)
    assert (logits(load_model(form)) - logits(load_model(stock))).abs().max() < 1e-5
    # The converter has no name for the tensors of a dense layer.
    assert not [tensor for tensor in hf_tensors(form) if ".mlp.down_proj" in tensor]


@pytest.mark.parametrize("frequency", FREQUENCIES)
@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied"])
def test_qwen2_as_a_mixtral_with_biases(name: str, frequency: str, dense_directory: Dense, tmp_path: Path) -> None:
    """In transformers' Mixtral with the biases that llama.cpp's Mixtral has."""
    stock, form = export_both(dense_directory(name), tmp_path, frequency)
    config = json.loads((form / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    model = MixtralForCausalLM(MixtralConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    for layer in model.model.layers:
        for projection in ("q_proj", "k_proj", "v_proj"):
            old = getattr(layer.self_attn, projection)
            setattr(layer.self_attn, projection, nn.Linear(old.in_features, old.out_features))
    tensors = load_file(form / "model.safetensors")
    missing, unexpected = _load(model, tensors)
    assert not missing and not unexpected
    assert (logits(model.eval()) - logits(load_model(stock))).abs().max() < 1e-5


def _load(model: nn.Module, tensors: dict[str, torch.Tensor]) -> tuple[set[str], set[str]]:
    """Load tensors one by one: from_pretrained would build layers without biases."""
    names = dict(model.named_parameters())
    given = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            given[name.replace("block_sparse_moe.gate", "mlp.gate")] = tensor
    for layer in range(model.config.num_hidden_layers):
        experts = [
            [tensors[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"] for expert in range(3)]
            for part in ("w1", "w3", "w2")
        ]
        gate, up, down = (torch.stack(part) for part in experts)
        given[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        given[f"model.layers.{layer}.mlp.experts.down_proj"] = down
    with torch.no_grad():
        for name, tensor in given.items():
            if name in names:
                names[name].copy_(tensor)
    return set(names) - set(given), set(given) - set(names)


def test_transformers_refuses_the_form_whose_biases_it_would_leave_out(dense_directory: Dense, tmp_path: Path) -> None:
    _, form = export_both(dense_directory("qwen2"), tmp_path, "[1,1,1]")
    with pytest.raises(ValueError, match="mixtral_for_llama_cpp"):
        AutoConfig.from_pretrained(form)
    with pytest.raises(SystemExit):
        run("import", "--hf", form, "--save", tmp_path / "again")


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_tokenizer_of_a_qwen2_with_yarn_loads(spelling: str, dense_directory: Dense, tmp_path: Path) -> None:
    """Loaded as llama.cpp's converter does: transformers runs other code for an unknown model type."""
    dense = shutil.copytree(dense_directory("qwen2"), tmp_path / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, dense / name)
    config = json.loads((dense / "config.json").read_text())
    del config["rope_parameters"]
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    if spelling == "rope_parameters":
        config |= {"rope_parameters": yarn | {"rope_theta": 5e5, "attention_factor": 1.1386294361119891}}
    else:
        config |= {"rope_scaling": yarn, "rope_theta": 5e5}
    (dense / "config.json").write_text(json.dumps(config))
    _, form = export_both(dense, tmp_path, "[0,1,1]")
    text = "Ünï 123"
    assert (
        AutoTokenizer.from_pretrained(form).encode(text)
        == Tokenizer.from_file(str(form / "tokenizer.json")).encode(text).ids
    )
    written = json.loads((form / "config.json").read_text())
    assert written["rope_parameters"] == yarn | {"rope_theta": 5e5} and written["rope_theta"] == 5e5


def test_sliding_window_is_said_and_limits_the_context(
    dense_directory: Dense, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock, form = export_both(dense_directory("mistral"), tmp_path, "[0,1,1]")
    assert "warning: sliding_window 8: llama.cpp has none" in capsys.readouterr().out
    config = json.loads((form / "config.json").read_text())
    assert config["sliding_window"] is None and config["max_position_embeddings"] == 8
    difference = (logits(load_model(form)) - logits(load_model(stock))).abs()
    assert difference[:, :8].max() < 1e-5 < 0.01 < difference[:, 8:].max()


def test_top_1_is_refused(dense_directory: Dense, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--num-experts", 3, "--top-k", 1, "--allow-top-1")
    run("import", "--hf", dense_directory("qwen3"), "--save", tmp_path / "checkpoint", *arguments)
    with pytest.raises(SystemExit):
        run("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "form", "--for", "llama.cpp")
    assert "error: --for llama.cpp: it weights a single expert by 1" in capsys.readouterr().err
    assert not (tmp_path / "form").exists()


def test_attention_factor_of_its_own_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = save_model("qwen3", tmp_path / "dense")
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
    for factor, exits in ((None, False), (1.1386294361119891, False), (1.5, True)):
        config = json.loads((dense / "config.json").read_text())
        config["rope_parameters"] = rope | ({"attention_factor": factor} if factor else {})
        (dense / "config.json").write_text(json.dumps(config))
        run("import", "--hf", dense, "--save", tmp_path / "checkpoint", "--num-experts", 2, "--overwrite")
        arguments = ("--load", tmp_path / "checkpoint", "--hf", tmp_path / "form", "--for", "llama.cpp", "--overwrite")
        if not exits:
            run("export", *arguments)
            assert "attention_factor" not in (tmp_path / "form" / "config.json").read_text()
            continue
        with pytest.raises(SystemExit):
            run("export", *arguments)
        assert "attention_factor 1.5" in capsys.readouterr().err
