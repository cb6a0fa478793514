"""`verify` and `inspect`, and the fingerprint of frozen weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.checkpoint.format.directory import CARD_FILE, resolve_checkpoint
from megatron_moe_lpr.model.configuration.parameters import describe_model
from megatron_moe_lpr.model.parameter_counts import active_parameters, count_parameters
from tests.conversion.fingerprint import checkpoint_fingerprint
from tests.conversion.helpers import perturb, rewrite_checkpoint, run
from tests.conversion.tiny_models import MODELS, load_model, save_model

Dense = Callable[[str], Path]


@pytest.mark.parametrize("name", MODELS)
def test_verify_against_the_dense_model_and_the_export(
    name: str, dense_directory: Dense, tmp_path: Path, capsys: pytest.CaptureFixture[str], cpu_platform: object
) -> None:
    run("import", "--hf", dense_directory(name), "--save", tmp_path / "checkpoint", "--num-experts", 4)
    run("verify", "--load", tmp_path / "checkpoint", "--hf", dense_directory(name), "--tolerance", 1e-4)
    rewrite_checkpoint(tmp_path / "checkpoint", perturb)
    run("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "moe")
    capsys.readouterr()
    run("verify", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "moe", "--tolerance", 1e-4)
    printed = capsys.readouterr()
    # transformers' own bar of loaded weights is off.
    assert "logits agree" in printed.out and "Loading" not in printed.err


def test_verify_reports_layers_that_differ(
    dense_directory: Dense, tmp_path: Path, capsys: pytest.CaptureFixture[str], cpu_platform: object
) -> None:
    run("import", "--hf", dense_directory("llama"), "--save", tmp_path / "checkpoint", "--num-experts", 1)

    def change_layer_1(tensors: dict[str, torch.Tensor]) -> None:
        tensors["decoder.layers.1.mlp.linear_fc2.weight"] += 0.1

    rewrite_checkpoint(tmp_path / "checkpoint", change_layer_1)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run("verify", "--load", tmp_path / "checkpoint", "--hf", dense_directory("llama"))
    assert exit_.value.code == 1
    printed = capsys.readouterr()
    assert "error: " in printed.err and "logits DIFFER" in printed.out
    lines = [[cell.strip() for cell in line.split("│")[1:3]] for line in printed.out.splitlines() if "│" in line]
    differences = {cells[0]: float(cells[1]) for cells in lines if cells[0].isdigit()}
    assert differences["0"] < 1e-4 < 0.01 < differences["1"]


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_are_transformers_own(name: str, dense_directory: Dense, tmp_path: Path) -> None:
    dense = load_model(dense_directory(name)).num_parameters()
    run("import", "--hf", dense_directory(name), "--save", tmp_path / "checkpoint", "--num-experts", 4)
    checkpoint = resolve_checkpoint(tmp_path / "checkpoint")
    counts = count_parameters(describe_model(checkpoint.architecture(), checkpoint.card().experts_per_layer))
    ffn, routers = 3 * 3 * 32 * 48, 3 * 4 * 32
    assert sum(count for kind, count in counts.items() if kind.is_original) == dense
    assert (counts["new experts"], counts["router"]) == (3 * ffn, routers)
    assert counts.total() == dense + 3 * ffn + routers
    assert active_parameters(counts, 2) == dense + ffn + routers
    if checkpoint.architecture().family.moe_model_type != "qwen2_moe":  # which has zero shared experts on top
        run("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "moe")
        assert load_model(tmp_path / "moe").num_parameters() == counts.total()


def test_inspect_shows_one_screen(dense_directory: Dense, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save = tmp_path / "checkpoint"
    run("import", "--hf", dense_directory("qwen3"), "--save", save, "--num-experts", 4, "--moe-layer-freq", 2)
    run("export", "--load", save, "--hf", tmp_path / "moe")
    capsys.readouterr()
    for directory in (save, save / "release", tmp_path / "moe", dense_directory("qwen3")):
        run("inspect", directory)
        printed = capsys.readouterr().out
        assert "qwen3 (Qwen3ForCausalLM)" in printed and len(printed.splitlines()) < 25
        assert ("4 1 4" in printed) == (directory != dense_directory("qwen3"))


def test_inspect_leaves_out_what_a_stage_did_not_have(
    dense_directory: Dense, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "checkpoint"
    run("import", "--hf", dense_directory("qwen3"), "--save", save, "--num-experts", 4)
    card = resolve_checkpoint(save).card()
    card.history.append({"stage": "1", "languages": ["el", "tr"], "original_languages": [], "train_iters": 7})
    (side_directory,) = (path.parent for path in save.rglob(CARD_FILE))
    card.write(side_directory / CARD_FILE)
    (side_directory / "checksums.json").unlink()
    capsys.readouterr()
    run("inspect", save)
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "stage 1, languages el tr, train iters 7" in printed


def test_fingerprint_changes_with_frozen_weights_alone(tmp_path: Path) -> None:
    dense = save_model("qwen2", tmp_path / "dense", torch.bfloat16)
    fingerprints = set()
    for experts in (1, 3):
        save = tmp_path / f"checkpoint-{experts}"
        run("import", "--hf", dense, "--save", save, "--num-experts", experts)
        fingerprints |= {resolve_checkpoint(save).card().original_fingerprint, checkpoint_fingerprint(save)}
        rewrite_checkpoint(save, perturb)
        fingerprints.add(checkpoint_fingerprint(save))
    assert len(fingerprints) == 1

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["decoder.layers.2.mlp.original_expert.linear_fc2.weight"][0, 0] += 1

    rewrite_checkpoint(save, nudge)
    assert checkpoint_fingerprint(save) not in fingerprints
