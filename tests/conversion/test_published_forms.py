"""What published checkpoints come with: yarn, zero biases, norms of another dtype, two sets of weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.conversion.verification.frozen import fingerprint_of_checkpoint
from tests.conversion.helpers import (
    assert_same_tensors,
    change_hf,
    checkpoint_tensors,
    hf_tensors,
    perturb,
    rewrite_checkpoint,
    run,
)
from tests.conversion.tiny_models import load_model, logits, save_model

Dense = Callable[[str], Path]


def change_config(directory: Path, **fields: object) -> None:
    config = json.loads((directory / "config.json").read_text()) | fields
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("factor", [None, 1.5])
def test_yarn_in_megatron_and_in_the_export(
    name: str, factor: float | None, tmp_path: Path, cpu_platform: object
) -> None:
    dense, save, moe = (tmp_path / part for part in ("dense", "save", "moe"))
    save_model(name, dense)
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    before = logits(load_model(dense))
    change_config(dense, rope_parameters=rope | ({"attention_factor": factor} if factor else {}))
    assert (logits(load_model(dense)) - before).abs().max() > 0.01, "yarn does not show"
    run("import", "--hf", dense, "--save", save, "--num-experts", 3)
    run("verify", "--load", save, "--hf", dense, "--tolerance", "1e-4")
    rewrite_checkpoint(save, perturb)
    run("export", "--load", save, "--hf", moe)
    run("verify", "--load", save, "--hf", moe, "--tolerance", "1e-4")


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama3-tied", "mistral"])
def test_rope_in_the_spelling_of_transformers_4(name: str, dense_directory: Dense, tmp_path: Path) -> None:
    """`make test-serving` loads both spellings in transformers 4 itself."""
    run("import", "--hf", dense_directory(name), "--save", tmp_path / "save", "--num-experts", 2)
    run("export", "--load", tmp_path / "save", "--hf", tmp_path / "moe")
    new, old = (json.loads((tmp_path / "moe" / "config.json").read_text()) for _ in range(2))
    rope = new["rope_parameters"]
    assert old.pop("rope_parameters")["rope_theta"] == old["rope_theta"]
    if rope["rope_type"] == "default":
        assert old["rope_scaling"] is None
    else:
        assert old["rope_scaling"] | {"rope_theta": old["rope_theta"]} == rope
    shutil.copytree(tmp_path / "moe", tmp_path / "old")
    (tmp_path / "old" / "config.json").write_text(json.dumps(old))
    assert torch.equal(logits(load_model(tmp_path / "old")), logits(load_model(tmp_path / "moe")))


def test_zero_attention_biases(tmp_path: Path, cpu_platform: object) -> None:
    dense = save_model("llama", tmp_path / "dense")
    before = hf_tensors(dense)
    change_config(dense, attention_bias=True)
    model = AutoModelForCausalLM.from_pretrained(dense)
    sizes = {name: p.numel() for name, p in model.named_parameters() if name.endswith("_proj.bias")}
    change_hf(dense, lambda tensors: tensors.update({name: torch.zeros(size) for name, size in sizes.items()}))
    assert len(sizes) == 12
    run("import", "--hf", dense, "--save", tmp_path / "save", "--num-experts", 1)
    run("verify", "--load", tmp_path / "save", "--hf", dense, "--tolerance", "1e-4")
    run("export", "--load", tmp_path / "save", "--hf", tmp_path / "back")
    assert hf_tensors(tmp_path / "back").keys() == before.keys()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["attention_bias"] is False
    assert torch.equal(logits(load_model(tmp_path / "back")), logits(load_model(dense)))


def test_norms_of_another_dtype_keep_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In checkpoint and export; transformers casts them to the matrices' dtype in both models."""
    dense = save_model("qwen2", tmp_path / "dense", torch.bfloat16)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "norm" in name:
                tensors[name] = tensor.float() * 1.001

    change_hf(dense, widen)
    run("import", "--hf", dense, "--save", tmp_path / "save", "--num-experts", 1)
    assert "note: 7 norms and biases" in capsys.readouterr().out
    run("export", "--load", tmp_path / "save", "--hf", tmp_path / "back")
    stored = checkpoint_tensors(tmp_path / "save").items()
    assert {tensor.dtype for key, tensor in stored if "norm" in key} == {torch.float32}
    assert {tensor.dtype for key, tensor in stored if "norm" not in key} == {torch.bfloat16}
    assert_same_tensors(hf_tensors(tmp_path / "back"), hf_tensors(dense))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    card = json.loads((tmp_path / "save" / "release" / "moe_lpr" / "card.json").read_text())
    assert card["original_fingerprint"] == fingerprint_of_checkpoint(tmp_path / "save")
    first, second = (load_model(tmp_path / part, torch.bfloat16) for part in ("dense", "back"))
    assert torch.equal(logits(first), logits(second))


def test_biases_of_several_dtypes_keep_their_values(tmp_path: Path) -> None:
    """Query, key and value become one tensor, in the dtype that holds them all."""
    dense = save_model("qwen2", tmp_path / "dense", torch.bfloat16)

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("k_proj.bias"):
                tensors[name] = tensor.half() * 1.001

    change_hf(dense, mix)
    run("import", "--hf", dense, "--save", tmp_path / "save", "--num-experts", 1)
    run("export", "--load", tmp_path / "save", "--hf", tmp_path / "back")
    found = hf_tensors(tmp_path / "back")
    for name, tensor in hf_tensors(dense).items():
        assert torch.equal(found[name].float(), tensor.float()), name
    assert resolve_checkpoint(tmp_path / "save").card().original_fingerprint == fingerprint_of_checkpoint(
        tmp_path / "save"
    )


def test_single_file_beside_an_index_is_read_as_transformers_does(tmp_path: Path) -> None:
    dense = save_model("qwen2", tmp_path / "dense", max_shard_size="20KB")
    single = save_model("qwen2", tmp_path / "single")
    change_hf(single, lambda tensors: tensors["model.norm.weight"].mul_(2))
    shutil.copyfile(single / "model.safetensors", dense / "model.safetensors")
    run("import", "--hf", dense, "--save", tmp_path / "save", "--num-experts", 1)
    run("export", "--load", tmp_path / "save", "--hf", tmp_path / "back")
    assert torch.equal(logits(load_model(tmp_path / "back")), logits(load_model(dense)))
    assert torch.equal(logits(load_model(tmp_path / "back")), logits(load_model(single)))
