"""Bases that are mixtures: import with new experts, export, and what is refused. transformers is the reference."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.commands import plan
from megatron_moe_lpr.conversion.hugging_face.hf_config import moe_config, stock_experts_per_layer, stock_top_k
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration import mixtures
from megatron_moe_lpr.model.configuration.architecture import read_architecture
from megatron_moe_lpr.model.configuration.mixtures import ExpertFields, Mixture
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind, kind_of
from tests.conversion.fingerprint import checkpoint_fingerprint
from tests.conversion.helpers import (
    change_config,
    checkpoint_tensors,
    hf_tensors,
    perturb,
    rewrite_checkpoint,
    run,
)
from tests.conversion.tiny_models import MIXTURES, load_model, logits, save_model
from tests.training.test_second_expansion import change_card

MATRICES = {"linear_fc1.weight_w": "gate_proj", "linear_fc1.weight_v": "up_proj", "linear_fc2.weight": "down_proj"}


def import_mixture(root: Path, name: str, *arguments: object) -> Path:
    save_model(name, root / "hf")
    for file in (root / "hf").glob("tokenizer*"):
        file.unlink()
    run("import", "--hf", root / "hf", "--save", root / "checkpoint", *arguments)
    return root / "checkpoint"


@pytest.mark.parametrize("name", MIXTURES)
def test_import_export_and_import_again(name, tmp_path, cpu_platform, capsys):
    """Step 0 is the base; the export is the base's own class with more experts, and its import is the checkpoint."""
    checkpoint = import_mixture(tmp_path, name, "--add-experts", 2, "--seed", 5)
    run("verify", "--load", checkpoint, "--hf", tmp_path / "hf", "--tolerance", 2e-5)
    card, dense = resolve_checkpoint(checkpoint).card(), MIXTURES[name][1].get("mlp_only_layers", [])
    assert card.experts_per_layer == [1 if layer in dense else 10 for layer in range(4)] and card.openness == 0
    assert card.expansions == [[0 if layer in dense else 2 for layer in range(4)]]
    assert checkpoint_fingerprint(checkpoint) == card.original_fingerprint
    assert "weigh 0%" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("export", "--load", checkpoint, "--hf", tmp_path / "exported")
    assert "a stock model has no such weight" in capsys.readouterr().err
    rewrite_checkpoint(checkpoint, perturb_new)
    change_card(checkpoint, openness=1.0)
    run("export", "--load", checkpoint, "--hf", tmp_path / "exported")
    assert "Not all of the base model's own weights" not in (tmp_path / "exported" / "README.md").read_text()
    run("verify", "--load", checkpoint, "--hf", tmp_path / "exported", "--tolerance", 2e-5)
    base, exported = (load_model(tmp_path / place) for place in ("hf", "exported"))
    assert type(base) is type(exported) and (logits(base) - logits(exported)).abs().max() > 0.01
    counts = {"num_experts": 10, "num_local_experts": 10}
    # transformers 5 reads either name; of a Qwen3-MoE, transformers 4 reads `num_experts` alone.
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["num_experts"] == 10
    differing = {
        key
        for key, value in base.config.to_dict().items()
        if exported.config.to_dict()[key] != value and key not in ("_name_or_path", "dtype")
    }
    assert differing <= counts.keys() and differing, differing
    run("import", "--hf", tmp_path / "exported", "--save", tmp_path / "again")
    before, after = checkpoint_tensors(checkpoint), checkpoint_tensors(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    again = resolve_checkpoint(tmp_path / "again").card()
    assert (again.expansions, again.openness) == (card.expansions, 1.0)
    assert again.original_fingerprint == card.original_fingerprint


def perturb_new(tensors: dict[str, torch.Tensor]) -> None:
    """As `perturb`, of new experts and their router rows alone."""
    kept = {key: tensor for key, tensor in tensors.items() if kind_of(key).is_original}
    perturb(tensors)
    tensors |= kept


def test_what_is_copied(tmp_path):
    checkpoint = import_mixture(tmp_path, "qwen2_moe", "--add-experts", "2,0,1,2", "--new-experts-from", "3,7;;0;7,7")
    hf, found = hf_tensors(tmp_path / "hf"), checkpoint_tensors(checkpoint)
    kinds = {"base experts", "base router rows", "shared expert", "new experts", "router"}
    assert {kind_of(key) for key in found} == {
        *map(ParameterKind, kinds),
        *map(ParameterKind, ("attention", "norm", "embedding")),
    }
    for layer, copied in enumerate(((3, 7), (), (0,), (7, 7))):
        mlp, theirs = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.mlp"
        router = hf[f"{theirs}.gate.weight"]
        assert torch.equal(found[f"{mlp}.router.base_rows"], router)
        if copied:
            assert torch.equal(found[f"{mlp}.router.weight"], router[list(copied)])
        else:
            assert f"{mlp}.router.weight" not in found
        assert torch.equal(found[f"{mlp}.shared_experts.gate_weight"], hf[f"{theirs}.shared_expert_gate.weight"])
        for matrix, projection in MATRICES.items():
            assert torch.equal(
                found[f"{mlp}.shared_experts.{matrix}"], hf[f"{theirs}.shared_expert.{projection}.weight"]
            )
            groups = [*(("base", expert, expert) for expert in range(8))]
            groups += [("newest", place, expert) for place, expert in enumerate(copied)]
            for group, place, expert in groups:
                key = f"{mlp}.experts.{group}.experts.{place}.{matrix}"
                assert torch.equal(found[key], hf[f"{theirs}.experts.{expert}.{projection}.weight"]), key
    assert not any(".layers.1.mlp.experts.newest" in key for key in found)
    entry = resolve_checkpoint(checkpoint).card().history[0]
    assert entry == {"stage": "added experts", "new_experts": [2, 0, 1, 2], "copied": [[3, 7], [], [0], [7, 7]]}


@pytest.mark.parametrize(
    ("fields", "arguments", "words"),
    [
        ({}, (), "--add-experts N keeps all of them frozen"),
        ({}, ("--add-experts", "0"), "not all 0"),
        ({}, ("--add-experts", "2,2"), "for 4 layers"),
        ({}, ("--add-experts", "x"), "a number, or one for each layer"),
        ({}, ("--add-experts", 2, "--new-experts-from", "8,0"), "numbers of the 8 experts of layer 0"),
        ({}, ("--add-experts", 2, "--new-experts-from", "1"), "names 1 experts for layer 0, which gets 2"),
        ({}, ("--add-experts", 2, "--new-experts-from", "1,2;3,4"), "names 2 layers, and the model has 4"),
        ({}, ("--add-experts", 6, "--expert-model-parallel-size", 4), "the 8 experts of the base model and the 6 new"),
        ({}, ("--add-experts", 2, "--num-experts", 4), "has 8 experts; leave the flag out"),
        ({}, ("--add-experts", 2, "--top-k", 2), "top-k 3; leave the flag out"),
        ({}, ("--add-experts", 2, "--expanded-languages", "el"), "training records the languages"),
        ({"mlp_only_layers": [0]}, ("--add-experts", 2), "must have the same intermediate size"),
        ({"use_sliding_window": True}, ("--add-experts", 2), "use_sliding_window=true is not supported"),
        ({"num_experts_per_tok": 9}, ("--add-experts", 2), "num_experts_per_tok must be a whole number from 1 to 8"),
        ({"num_experts_per_tok": 1}, ("--add-experts", 2), "one expert per token"),
    ],
)
def test_refused(fields, arguments, words, tmp_path, capsys):
    save_model("qwen3_moe", tmp_path / "hf")
    change_config(tmp_path / "hf", **fields)
    with pytest.raises(SystemExit):
        run("import", "--hf", tmp_path / "hf", "--save", tmp_path / "out", *arguments)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adding_to_a_dense_model_or_to_an_export_is_refused(tmp_path, capsys):
    save_model("qwen3", tmp_path / "dense")
    with pytest.raises(SystemExit):
        run("import", "--hf", tmp_path / "dense", "--save", tmp_path / "out", "--add-experts", 2)
    assert "is for a base model that is a mixture" in capsys.readouterr().err


def test_different_numbers_cannot_be_exported(tmp_path, capsys):
    checkpoint = import_mixture(tmp_path, "mixtral", "--add-experts", "2,0,2,2")
    change_card(checkpoint, openness=1.0)
    with pytest.raises(SystemExit):
        run("export", "--load", checkpoint, "--hf", tmp_path / "exported")
    line = capsys.readouterr().err
    assert "different numbers of experts (8, 10)" in line and "as --add-experts N does" in line


def test_other_mixtures_are_sent_to_no_flag_that_refuses_them(tmp_path, capsys):
    save_model("olmo2", tmp_path / "dense")
    run("import", "--hf", tmp_path / "dense", "--save", tmp_path / "checkpoint", "--num-experts", 3)
    run("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "hf")
    shutil.rmtree(tmp_path / "hf" / "moe_lpr")
    for arguments, words in (((), "new ones beside them are for mixtral,"), (("--add-experts", 2), "is none of those")):
        with pytest.raises(SystemExit):
            run("import", "--hf", tmp_path / "hf", "--save", tmp_path / "out", *arguments)
        assert words in capsys.readouterr().err


def test_the_plan_of_a_mixture(tmp_path, capsys):
    """EP is tried where it divides both the base model's experts and the new ones; the counts are the model's."""
    (tmp_path / "config.json").write_text(QWEN3)
    plan.main(["--hf", str(tmp_path), "--gpus", "64", "--add-experts", "4", "--show", "100"])
    printed = capsys.readouterr().out
    experts = 48 * 3 * 2048 * 768
    assert f"{48 * 4 * 2048 + 4 * experts:,} trained" in printed
    found = {line.split("│")[3].strip() for line in printed.splitlines() if line.count("│") > 14} - {""}
    assert found == {"1", "2", "4"}
    for arguments, words in (((), "is a mixture; say with --add-experts"), (("--add-experts", "x"), "--add-experts x")):
        with pytest.raises(UserError, match=words):
            plan.main(["--hf", str(tmp_path), "--gpus", "64", *arguments])


def test_published_configurations():
    """Fields as Qwen3-30B-A3B, Qwen1.5-MoE-A2.7B and Mixtral-8x7B have them.

    Compared field by field with copies in public repositories: the whole files of Qwen3-30B-A3B and Mixtral-8x7B-v0.1,
    and a test that quotes Qwen1.5-MoE-A2.7B's. All fields that the copies have are equal.
    """
    qwen3 = read_architecture(json.loads(QWEN3))
    assert (qwen3.ffn_hidden_size, qwen3.head_dim, qwen3.mixture.experts) == (768, 128, (128,) * 48)
    assert (qwen3.mixture.top_k, qwen3.mixture.renormalised, qwen3.rope["rope_theta"]) == (8, True, 1e6)
    qwen2 = read_architecture(json.loads(QWEN2))
    assert (qwen2.ffn_hidden_size, qwen2.mixture.shared_expert_size, qwen2.mixture.renormalised) == (1408, 5632, False)
    mixtral = read_architecture(json.loads(MIXTRAL))
    assert (mixtral.ffn_hidden_size, mixtral.sliding_window, mixtral.mixture.experts) == (14336, None, (8,) * 32)
    assert (mixtral.mixture.top_k, mixtral.mixture.renormalised, mixtral.norm_epsilon) == (2, True, 1e-5)


def test_a_stock_form_may_name_its_experts_otherwise(monkeypatch):
    """One row of the table: the numbers are read and written back under these names."""
    names = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}
    usual = json.loads(QWEN3)
    renamed = {names.get(name, name): value for name, value in usual.items()}
    monkeypatch.setattr(mixtures, "EXPERT_FIELDS", {"qwen3_moe": ExpertFields(("moe_num_experts",), "moe_k")})
    assert read_architecture(renamed).mixture == Mixture((128,) * 48, 8, True)
    assert (stock_top_k(renamed, "config.json"), stock_experts_per_layer(renamed, "config.json")) == (8, [128] * 48)
    written = moe_config(renamed, read_architecture(renamed), [130] * 48, 8)
    assert (written["moe_num_experts"], written["moe_k"]) == (130, 8) and not names.keys() & written.keys()
    with pytest.raises(UserError, match="moe_k must be a whole number from 1 to 128"):
        read_architecture(renamed | {"moe_k": 129})


QWEN3 = """{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
"hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
"max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
"norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
"num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06,
"rope_scaling": null, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null,
"tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false,
"vocab_size": 151936}"""
QWEN2 = """{"architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
"eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
"max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe", "num_attention_heads": 16,
"num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
"sliding_window": 32768, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true,
"use_sliding_window": false, "vocab_size": 151936, "decoder_sparse_step": 1, "moe_intermediate_size": 1408,
"shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60, "norm_topk_prob": false,
"output_router_logits": false, "router_aux_loss_coef": 0.001}"""
MIXTRAL = """{"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
"hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
"max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
"num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
"rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": null,
"tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 32000}"""
