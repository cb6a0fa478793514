"""Import and export against transformers: the same tensors, the same logits, nothing lost on the way."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conversion.helpers import (
    UPCYCLED_ELSEWHERE,
    assert_same_tensors,
    change_hf,
    checkpoint_tensors,
    hf_tensors,
    perturb,
    rewrite_checkpoint,
    run,
)
from tests.conversion.tiny_models import MODELS, load_model, logits, make_model, save_model

Dense = Callable[[str], Path]


@pytest.mark.parametrize("name", MODELS)
def test_dense_round_trip_is_bit_identical(name: str, dense_directory: Dense, tmp_path: Path) -> None:
    run("import", "--hf", dense_directory(name), "--save", tmp_path / "checkpoint", "--num-experts", 1)
    run("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "back")
    assert_same_tensors(hf_tensors(dense_directory(name)), hf_tensors(tmp_path / "back"))
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (dense_directory(name) / file).read_bytes()
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (dense_directory(name), tmp_path / "back")
    )
    # What transformers 4 reads, beside the rope_parameters of the installed version.
    added = {key: after.pop(key) for key in ("rope_theta", "rope_scaling")}
    assert after == before and added["rope_theta"] == before["rope_parameters"]["rope_theta"]
    assert torch.equal(logits(load_model(tmp_path / "back")), logits(make_model(name)))


@pytest.mark.parametrize("name", MODELS)
def test_upcycled_export_computes_what_the_dense_model_does(name: str, dense_directory: Dense, tmp_path: Path) -> None:
    run("import", "--hf", dense_directory(name), "--save", tmp_path / "checkpoint", "--num-experts", 4)
    run("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "moe")
    model = load_model(tmp_path / "moe")
    assert model.config.model_type in ("mixtral", "qwen2_moe", "qwen3_moe")
    assert (logits(model) - logits(make_model(name))).abs().max() < 1e-4
    assert model.config.tie_word_embeddings == MODELS[name][1].get("tie_word_embeddings", False)
    assert ("lm_head.weight" in hf_tensors(tmp_path / "moe")) != model.config.tie_word_embeddings


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_moe_round_trip_is_bit_identical(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    dense, first, moe, second = (tmp_path / part for part in ("dense", "first", "moe", "second"))
    save_model(name, dense, dtype)
    run("import", "--hf", dense, "--save", first, "--num-experts", 3)
    rewrite_checkpoint(first, perturb)
    run("export", "--load", first, "--hf", moe)
    for tensor_name, tensor in hf_tensors(moe).items():
        is_router = tensor_name.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight"))
        assert tensor.dtype == (torch.float32 if is_router else dtype), tensor_name
    run("import", "--hf", moe, "--save", second)
    assert_same_tensors(checkpoint_tensors(first), checkpoint_tensors(second))
    run("export", "--load", second, "--hf", tmp_path / "again")
    assert_same_tensors(hf_tensors(moe), hf_tensors(tmp_path / "again"))
    for part in ("config.json", "moe_lpr/config.json", "moe_lpr/card.json"):
        assert (moe / part).read_bytes() == (tmp_path / "again" / part).read_bytes(), part


@pytest.mark.parametrize("name", ["qwen2", "mistral"])
def test_bf16_export_routes_as_megatron_does(name: str, tmp_path: Path) -> None:
    """Rounded to bf16, routers would send some tokens to other experts."""
    dense, checkpoint, moe = (tmp_path / part for part in ("dense", "checkpoint", "moe"))
    save_model(name, dense, torch.bfloat16)
    run("import", "--hf", dense, "--save", checkpoint, "--num-experts", 3)
    rewrite_checkpoint(checkpoint, perturb)
    run("export", "--load", checkpoint, "--hf", moe)
    run("verify", "--load", checkpoint, "--hf", moe, "--tolerance", "1e-4")


@pytest.mark.parametrize("name", ["qwen2", "qwen3-tied", "llama", "mistral"])
def test_stock_moe_without_our_files_comes_back(name: str, dense_directory: Dense, tmp_path: Path) -> None:
    first, moe, second, again = (tmp_path / part for part in ("first", "moe", "second", "again"))
    run("import", "--hf", dense_directory(name), "--save", first, "--num-experts", 3)
    rewrite_checkpoint(first, perturb)
    run("export", "--load", first, "--hf", moe)
    # Saved by transformers itself, so in the spelling of the version that is installed.
    stock = tmp_path / "stock"
    load_model(moe).save_pretrained(stock)
    run("import", "--hf", stock, "--save", second, *UPCYCLED_ELSEWHERE)
    run("export", "--load", second, "--hf", again)
    assert_same_tensors(checkpoint_tensors(first), checkpoint_tensors(second))
    assert torch.equal(logits(load_model(again)), logits(load_model(moe)))


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_every_other_layer_dense(name: str, dense_directory: Dense, tmp_path: Path) -> None:
    first, moe, second = (tmp_path / part for part in ("first", "moe", "second"))
    run("import", "--hf", dense_directory(name), "--save", first, "--num-experts", 3, "--moe-layer-freq", 2)
    run("export", "--load", first, "--hf", moe)
    config = json.loads((moe / "config.json").read_text())
    assert config["mlp_only_layers"] == [1]
    assert (logits(load_model(moe)) - logits(make_model(name))).abs().max() < 1e-4
    run("import", "--hf", moe, "--save", second)
    assert_same_tensors(checkpoint_tensors(first), checkpoint_tensors(second))


def test_old_spelling_of_rope_survives(tmp_path: Path) -> None:
    dense = save_model("llama3-tied", tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    for name in ("rms_norm_eps", "num_key_value_heads", "head_dim"):
        config.pop(name, None)
    config["num_key_value_heads"] = 2
    (dense / "config.json").write_text(json.dumps(config))
    run("import", "--hf", dense, "--save", tmp_path / "checkpoint", "--num-experts", 2)
    run("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "moe")
    exported = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert exported["rope_scaling"] == rope and exported["rope_theta"] == 500000.0
    assert (logits(load_model(tmp_path / "moe")) - logits(load_model(dense))).abs().max() < 1e-4


def test_fields_left_to_defaults_mean_the_same_after_export(tmp_path: Path) -> None:
    dense = save_model("llama", tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    # Mixtral's own defaults for these differ from Llama's.
    for name in ("rms_norm_eps", "rope_parameters", "head_dim", "tie_word_embeddings"):
        config.pop(name, None)
    (dense / "config.json").write_text(json.dumps(config))
    run("import", "--hf", dense, "--save", tmp_path / "checkpoint", "--num-experts", 2)
    run("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "moe")
    assert (logits(load_model(tmp_path / "moe")) - logits(load_model(dense))).abs().max() < 1e-4


def test_config_names_the_dtype_that_training_left(dense_directory: Dense, tmp_path: Path) -> None:
    run("import", "--hf", dense_directory("qwen2"), "--save", tmp_path / "checkpoint", "--num-experts", 1)

    def to_bfloat16(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            tensors[key] = tensor.bfloat16()

    rewrite_checkpoint(tmp_path / "checkpoint", to_bfloat16)
    run("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in hf_tensors(tmp_path / "back").values()} == {torch.bfloat16}


def test_shards_in_and_out(tmp_path: Path) -> None:
    dense = save_model("qwen2-tied", tmp_path / "dense", max_shard_size="20KB")
    assert len(list(dense.glob("*.safetensors"))) > 2
    run("import", "--hf", dense, "--save", tmp_path / "checkpoint", "--num-experts", 2)
    run("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "moe", "--max-shard-size", "30KB")
    files = sorted(path.name for path in (tmp_path / "moe").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert (logits(load_model(tmp_path / "moe")) - logits(make_model("qwen2-tied"))).abs().max() < 1e-4


def test_padded_vocabulary_is_trimmed(dense_directory: Dense, tmp_path: Path) -> None:
    run("import", "--hf", dense_directory("llama"), "--save", tmp_path / "checkpoint", "--num-experts", 1)

    def pad(tensors: dict[str, torch.Tensor]) -> None:
        for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            tensors[key] = torch.nn.functional.pad(tensors[key], (0, 0, 0, 29), value=9.0)
        tensors["optimizer.state.exp_avg.decoder.layers.0.mlp.router.weight"] = torch.ones(3)

    rewrite_checkpoint(tmp_path / "checkpoint", pad)
    run("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "back")
    assert_same_tensors(hf_tensors(dense_directory("llama")), hf_tensors(tmp_path / "back"))


def test_redundant_tied_output_layer_and_old_buffers_are_accepted(tmp_path: Path) -> None:
    dense = save_model("qwen2-tied", tmp_path / "dense")
    before = hf_tensors(dense)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    change_hf(dense, add)
    run("import", "--hf", dense, "--save", tmp_path / "checkpoint", "--num-experts", 1)
    run("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "back")
    assert_same_tensors(before, hf_tensors(tmp_path / "back"))


def test_exported_dense_model_can_be_imported_again(dense_directory: Dense, tmp_path: Path) -> None:
    run("import", "--hf", dense_directory("qwen3"), "--save", tmp_path / "checkpoint", "--num-experts", 1)
    run("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "back")
    run("import", "--hf", tmp_path / "back", "--save", tmp_path / "again", "--num-experts", 1)
    assert_same_tensors(checkpoint_tensors(tmp_path / "checkpoint"), checkpoint_tensors(tmp_path / "again"))
