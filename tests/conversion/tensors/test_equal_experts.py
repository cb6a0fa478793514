"""Dense layers of Llama and Mistral: equal experts under a zero router in the export, dense again after an import."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from tests.conversion.helpers import (
    assert_same_tensors,
    checkpoint_tensors,
    hf_tensors,
    perturb,
    rewrite_checkpoint,
    run,
)
from tests.conversion.tiny_models import load_model, logits, make_model

Dense = Callable[[str], Path]


@pytest.mark.parametrize("name", ["llama", "llama3-tied", "mistral"])
def test_export_computes_what_megatron_does_and_comes_back(
    name: str, dense_directory: Dense, tmp_path: Path, cpu_platform: object
) -> None:
    first, moe, second = (tmp_path / part for part in ("first", "moe", "second"))
    run("import", "--hf", dense_directory(name), "--save", first, "--num-experts", 3, "--moe-layer-freq", "[0,1,0]")
    rewrite_checkpoint(first, perturb)
    run("export", "--load", first, "--hf", moe)
    run("verify", "--load", first, "--hf", moe, "--tolerance", "1e-4")
    assert (logits(load_model(moe)) - logits(make_model(name))).abs().max() > 0.01, "the perturbation does not show"
    run("import", "--hf", moe, "--save", second)
    assert resolve_checkpoint(second).card().experts_per_layer == [1, 3, 1]
    assert_same_tensors(checkpoint_tensors(first), checkpoint_tensors(second))


def test_import_says_what_dense_layers_cost_in_the_export(
    dense_directory: Dense, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {}
    for frequency in ("[0,1,0]", "[1,1,1]"):
        save, moe, _flags = tmp_path / f"save{frequency}", tmp_path / f"moe{frequency}", ("--moe-layer-freq", frequency)
        run(
            "import",
            "--hf",
            dense_directory("llama"),
            "--save",
            save,
            "--num-experts",
            4,
            "--moe-layer-freq",
            frequency,
        )
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        run("export", "--load", save, "--hf", moe)
        sizes[frequency] = sum(math.prod(t.shape) * t.dtype.itemsize for t in hf_tensors(moe).values())
        assert bool(notes) == (frequency == "[0,1,0]")
        if notes:
            said = int(notes[0].split(" takes ")[1].split(" bytes")[0].replace(",", ""))
    assert sizes["[0,1,0]"] == sizes["[1,1,1]"]
    dense_layers = 2 * 3 * 32 * 48 * 4
    whole = sum(t.nbytes for t in checkpoint_tensors(tmp_path / "save[0,1,0]").values())
    assert said == sizes["[0,1,0]"] - whole == 3 * dense_layers + 2 * 4 * 32 * 4


def test_equal_experts_are_exact_for_two(dense_directory: Dense, tmp_path: Path) -> None:
    """Half of a number twice is that number: no rounding at top-k 2, with all routers zero."""
    save, moe = tmp_path / "save", tmp_path / "moe"
    run("import", "--hf", dense_directory("mistral"), "--save", save, "--num-experts", 4)
    rewrite_checkpoint(save, lambda tensors: [t.zero_() for key, t in tensors.items() if ".router." in key])
    run("export", "--load", save, "--hf", moe)
    difference = (logits(load_model(moe)) - logits(make_model("mistral"))).abs().max()
    assert difference < 1e-5 and torch.isfinite(difference)
