"""Two fields of a config.json that say different things: read as transformers reads them, in the export too."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conversion.helpers import UPCYCLED_ELSEWHERE, change_config, perturb, rewrite_checkpoint, run
from tests.conversion.tiny_models import load_model, logits, make_model

Dense = Callable[[str], Path]

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"type": "linear", "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
NO_CONTEXT = {name: value for name, value in YARN.items() if name != "original_max_position_embeddings"}
# None removes a field.
ROPES = {
    "a model card's rope_scaling beside rope_parameters": {"rope_theta": 1e6, "rope_scaling": YARN},
    "rope_scaling without a base frequency": {"rope_scaling": LINEAR, "rope_parameters": YARN | {"rope_theta": 1e6}},
    "two types": {"rope_scaling": LLAMA3, "rope_parameters": YARN | {"rope_theta": 1e6}, "rope_theta": 5e5},
    "rope_scaling is the default": {
        "rope_scaling": DEFAULT | {"rope_theta": 100.0},
        "rope_parameters": YARN | {"rope_theta": 1e6},
    },
    "rope_scaling is empty": {"rope_scaling": {}, "rope_parameters": YARN | {"rope_theta": 1e6}},
    "rope_theta outside and inside": {"rope_theta": 1e6, "rope_parameters": YARN | {"rope_theta": 100.0}},
    "rope_theta outside and in the default": {"rope_theta": 1e6, "rope_parameters": DEFAULT | {"rope_theta": 100.0}},
    "rope_theta outside and in rope_scaling": {
        "rope_theta": 1e6,
        "rope_scaling": YARN | {"rope_theta": 100.0},
        "rope_parameters": None,
    },
    "original context outside": {
        "rope_parameters": None,
        "rope_theta": 1e4,
        "rope_scaling": NO_CONTEXT,
        "original_max_position_embeddings": 16,
    },
    "yarn's factor is not the ratio of contexts": {"rope_parameters": YARN | {"factor": 2.0, "rope_theta": 1e4}},
}


def assert_one_meaning(directory: Path) -> None:
    """transformers 4 reads `rope_theta` and `rope_scaling` alone, 5 reads what it does of all three: the same."""
    config, rope = json.loads((directory / "config.json").read_text()), load_model(directory).config.rope_parameters
    assert config["rope_theta"] == rope["rope_theta"]
    older = config.get("rope_scaling") or {"rope_type": "default"}
    assert {"rope_theta": config["rope_theta"], **older} == rope
    assert config.get("rope_parameters", rope) == rope


@pytest.mark.parametrize(("name", "case"), zip(itertools.cycle(["qwen3", "llama"]), ROPES))
def test_rope_is_what_transformers_reads(
    name: str, case: str, dense_directory: Dense, tmp_path: Path, cpu_platform: object
) -> None:
    dense = Path(shutil.copytree(dense_directory(name), tmp_path / "dense"))
    change_config(dense, **ROPES[case])
    expected = logits(load_model(dense))
    assert (expected - logits(make_model(name))).abs().max() > 0.01, "the change does not show"
    run("import", "--hf", dense, "--save", tmp_path / "save", "--num-experts", 2)
    run("verify", "--load", tmp_path / "save", "--hf", dense, "--tolerance", "1e-4")
    run("import", "--hf", dense, "--save", tmp_path / "plain", "--num-experts", 1)
    for save in ("save", "plain"):
        run("export", "--load", tmp_path / save, "--hf", tmp_path / f"{save}-hf")
        assert (logits(load_model(tmp_path / f"{save}-hf")) - expected).abs().max() < 1e-4
        assert_one_meaning(tmp_path / f"{save}-hf")


def test_a_rope_that_is_not_the_one_read_is_noted(
    dense_directory: Dense, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = Path(shutil.copytree(dense_directory("qwen3"), tmp_path / "dense"))
    change_config(dense, rope_theta=1e6, rope_scaling=YARN)
    run("import", "--hf", dense, "--save", tmp_path / "save", "--num-experts", 2)
    assert "note: config.json's rope_parameters says otherwise: read, as transformers does, was yarn" in (
        capsys.readouterr().out
    )


EDITS = {
    "a longer context": {"rope_scaling": YARN},
    "rope_theta": {"rope_theta": 100.0, "rope_parameters": None},
    "rope_theta of transformers 4 alone, which 5 does not read": {"rope_theta": 100.0},
    "epsilon": {"rms_norm_eps": 0.3},
    "experts per token": {"num_experts_per_tok": 3},
    "end of text": {"eos_token_id": 7, "pad_token_id": 3},
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("side_files", [True, False])
@pytest.mark.parametrize("name", ["qwen3-tied", "llama"])
def test_an_edited_config_of_an_export_counts(
    name: str, side_files: bool, edit: str, dense_directory: Dense, tmp_path: Path
) -> None:
    run("import", "--hf", dense_directory(name), "--save", tmp_path / "save", "--num-experts", 4)
    rewrite_checkpoint(tmp_path / "save", perturb)
    run("export", "--load", tmp_path / "save", "--hf", tmp_path / "moe")
    change_config(tmp_path / "moe", **EDITS[edit])
    if not side_files:
        shutil.rmtree(tmp_path / "moe" / "moe_lpr")
    expected = load_model(tmp_path / "moe")
    flags = () if side_files else UPCYCLED_ELSEWHERE
    run("import", "--hf", tmp_path / "moe", "--save", tmp_path / "again", *flags)
    run("export", "--load", tmp_path / "again", "--hf", tmp_path / "moe-again")
    found = load_model(tmp_path / "moe-again")
    assert torch.equal(logits(found), logits(expected))
    for field in ("rope_parameters", "eos_token_id", "pad_token_id", "num_experts_per_tok", "rms_norm_eps"):
        assert getattr(found.config, field) == getattr(expected.config, field), field
    card = json.loads((tmp_path / "moe-again" / "moe_lpr" / "card.json").read_text())
    assert card["family"] == (name.split("-")[0] if side_files or name != "llama" else "mistral")


def test_a_window_is_added_to_an_export(dense_directory: Dense, tmp_path: Path, refuse: Callable[..., str]) -> None:
    """Mistral has one; a Llama has none, so its export cannot get one and stay a Llama."""
    for name in ("mistral-full", "llama"):
        run("import", "--hf", dense_directory(name), "--save", tmp_path / name, "--num-experts", 2)
        run("export", "--load", tmp_path / name, "--hf", tmp_path / f"{name}-moe")
        change_config(tmp_path / f"{name}-moe", sliding_window=8)
    run("import", "--hf", tmp_path / "mistral-full-moe", "--save", tmp_path / "again")
    run("export", "--load", tmp_path / "again", "--hf", tmp_path / "moe")
    assert torch.equal(logits(load_model(tmp_path / "moe")), logits(load_model(tmp_path / "mistral-full-moe")))
    refuse("import", "--hf", tmp_path / "llama-moe", "--save", tmp_path / "none")


def test_mixtrals_own_base_frequency(dense_directory: Dense, tmp_path: Path) -> None:
    """rope_parameters without rope_theta: 1e6 in Mixtral, where Mistral has 1e4."""
    run("import", "--hf", dense_directory("mistral-full"), "--save", tmp_path / "save", "--num-experts", 2)
    run("export", "--load", tmp_path / "save", "--hf", tmp_path / "moe")
    shutil.rmtree(tmp_path / "moe" / "moe_lpr")
    change_config(tmp_path / "moe", rope_theta=None, rope_parameters={"rope_type": "default"})
    expected = load_model(tmp_path / "moe")
    assert expected.config.rope_parameters["rope_theta"] == 1e6
    run("import", "--hf", tmp_path / "moe", "--save", tmp_path / "again", *UPCYCLED_ELSEWHERE)
    run("export", "--load", tmp_path / "again", "--hf", tmp_path / "back")
    assert torch.equal(logits(load_model(tmp_path / "back")), logits(expected))


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("llama", {"rope_scaling": LINEAR | {"rope_type": "yarn"}}, ["rope_type is 'yarn' and type is 'linear'"]),
        (
            "llama",
            {"rope_scaling": YARN, "original_max_position_embeddings": 64},
            ["original_max_position_embeddings is 64", "rope_scaling", "it is 16"],
        ),
        ("qwen3", {"rope_parameters": {"full_attention": DEFAULT}}, ["rope_parameters", "each kind of layer"]),
        ("qwen2", {"vocab_size": 120}, ["model.embed_tokens.weight", "vocab_size"]),
        ("llama", {"head_dim": 16}, ["config.json wants"]),
        ("llama", {"is_causal": False}, ["is_causal=False"]),
        ("qwen3", {"per_layer_config": {"1": {"sliding_window": 4}}}, ["per_layer_config"]),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, ["layer_types names 2 layers", "num_hidden_layers is 3"]),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, ["layer_types", "without a window here"]),
        ("mistral", {"layer_types": ["full_attention"] * 3}, ["layer_types", "window is 8"]),
    ],
)
def test_refused_by_naming_both(
    name: str,
    fields: dict,
    words: list[str],
    dense_directory: Dense,
    tmp_path: Path,
    refuse: Callable[..., str],
) -> None:
    dense = Path(shutil.copytree(dense_directory(name), tmp_path / "dense"))
    change_config(dense, **fields)
    line = refuse("import", "--hf", dense, "--save", tmp_path / "save")
    assert all(word in line for word in words), line


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_window_of_a_stock_mixture(
    name: str, dense_directory: Dense, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    """max_window_layers means something else there than in the dense model, whose rule would overlook it."""
    run("import", "--hf", dense_directory(name), "--save", tmp_path / "save", "--num-experts", 3)
    run("export", "--load", tmp_path / "save", "--hf", tmp_path / "moe")
    change_config(tmp_path / "moe", use_sliding_window=True, sliding_window=8, layer_types=None)
    line = refuse("import", "--hf", tmp_path / "moe", "--save", tmp_path / "again")
    assert "use_sliding_window=true is not supported" in line


@pytest.mark.parametrize(("first", "second"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_two_names_of_the_dtype(first: str, second: str, dense_directory: Dense, tmp_path: Path) -> None:
    """Neither counts for the weights, which have their own; the export names theirs in both."""
    dense = Path(shutil.copytree(dense_directory("qwen2"), tmp_path / "dense"))
    change_config(dense, dtype=first, torch_dtype=second)
    run("import", "--hf", dense, "--save", tmp_path / "save", "--num-experts", 2)
    run("export", "--load", tmp_path / "save", "--hf", tmp_path / "moe")
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_two_numbers_of_experts(name: str, dense_directory: Dense, tmp_path: Path, refuse: Callable[..., str]) -> None:
    run("import", "--hf", dense_directory(name), "--save", tmp_path / "save", "--num-experts", 3)
    run("export", "--load", tmp_path / "save", "--hf", tmp_path / "moe")
    change_config(tmp_path / "moe", num_experts=3, num_local_experts=4)
    line = refuse("import", "--hf", tmp_path / "moe", "--save", tmp_path / "again")
    assert "num_local_experts is 4 and num_experts is 3" in line
