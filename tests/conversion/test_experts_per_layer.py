"""Numbers of experts by layer: the flag, what an import makes of it, and what a stock export can hold."""

import json

import pytest
import torch

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.conversion.experts_per_layer import read_experts_per_layer
from megatron_moe_lpr.errors import UserError
from tests.conversion.helpers import checkpoint_tensors, perturb, rewrite_checkpoint, run
from tests.conversion.tiny_models import load_model, logits, save_model
from tests.evaluation.tools import load_tool


def test_a_list_and_a_file(tmp_path):
    assert read_experts_per_layer("5,1,2", 3) == [5, 1, 2]
    (tmp_path / "a.json").write_text(json.dumps({"experts_per_layer": [3, 1, 2], "similarity": []}))
    assert read_experts_per_layer(str(tmp_path / "a.json"), 3) == [3, 1, 2]


@pytest.mark.parametrize("text", ["5,1", "5,1,2,3", "5,0,2", "5,x,2", "", "5,-1,2", "[5,1,2]"])
def test_what_is_no_list_for_the_model_is_refused(text):
    with pytest.raises(UserError, match="--experts-per-layer"):
        read_experts_per_layer(text, 3)


def test_a_file_without_the_field_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="a JSON file with experts_per_layer"):
        read_experts_per_layer(str(tmp_path / "a.json"), 3)


def test_unequal_counts_are_imported_and_compute_what_the_dense_model_does(tmp_path, cpu_platform):
    save_model("qwen2", tmp_path / "hf")
    run("import", "--hf", tmp_path / "hf", "--save", tmp_path / "moe", "--experts-per-layer", "5,1,2")
    tensors = checkpoint_tensors(tmp_path / "moe")
    assert tensors["decoder.layers.0.mlp.router.weight"].shape == (5, 32)
    assert tensors["decoder.layers.2.mlp.router.weight"].shape == (2, 32)
    assert "decoder.layers.0.mlp.experts.experts.3.linear_fc2.weight" in tensors
    assert "decoder.layers.2.mlp.experts.experts.1.linear_fc2.weight" not in tensors
    assert resolve_checkpoint(tmp_path / "moe").card().experts_per_layer == [5, 1, 2]
    run("verify", "--load", tmp_path / "moe", "--hf", tmp_path / "hf", "--tolerance", 1e-4)


def test_export_of_unequal_counts_is_refused_with_the_way_out(tmp_path, refuse):
    save_model("qwen2", tmp_path / "hf")
    run("import", "--hf", tmp_path / "hf", "--save", tmp_path / "moe", "--experts-per-layer", "5,1,2")
    line = refuse("export", "--load", tmp_path / "moe", "--hf", tmp_path / "stock")
    assert "different numbers of experts (2, 5)" in line and "--uniform-count" in line


def test_one_number_or_none_is_exported(tmp_path):
    save_model("qwen3", tmp_path / "hf")
    run("import", "--hf", tmp_path / "hf", "--save", tmp_path / "moe", "--experts-per-layer", "3,1,3")
    rewrite_checkpoint(tmp_path / "moe", perturb)
    run("export", "--load", tmp_path / "moe", "--hf", tmp_path / "stock")
    run("import", "--hf", tmp_path / "stock", "--save", tmp_path / "again", "--experts-per-layer", "3,1,3")
    before, after = (checkpoint_tensors(tmp_path / name) for name in ("moe", "again"))
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert torch.isfinite(logits(load_model(tmp_path / "stock"))).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--num-experts", 3), "--num-experts and --experts-per-layer"),
        (("--moe-layer-freq", 2), "--moe-layer-freq and --experts-per-layer"),
        (("--top-k", 3), "between 1 and the number of experts, 2"),
        (("--expert-model-parallel-size", 2), "2 does not divide 1 new experts"),
    ],
)
def test_flags_that_do_not_fit_beside_it(dense, tmp_path, refuse, arguments, words):
    assert words in refuse(
        "import", "--hf", dense, "--save", tmp_path / "moe", "--experts-per-layer", "5,1,2", *arguments
    )


def test_plan_says_what_an_allocation_saves(tmp_path, monkeypatch, capsys):
    save_model("qwen2", tmp_path / "hf")
    tool = load_tool("plan")
    arguments = ["--hf", str(tmp_path / "hf"), "--gpus", "1", "--experts-per-layer", "5,1,2", "--num-experts", "6"]
    monkeypatch.setattr("sys.argv", ["plan.py", *arguments, "--seq-length", "128"])
    tool.main()
    printed = capsys.readouterr().out
    assert "New experts: 5 instead of 15 (6 experts in every layer): -67%" in printed
    ffn, router = 3 * 32 * 48, 32
    dense = load_model(tmp_path / "hf").num_parameters()
    assert f"parameters {dense + 5 * ffn + 7 * router:,} instead of {dense + 15 * ffn + 18 * router:,}" in printed
