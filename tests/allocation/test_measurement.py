"""FFN inputs, how alike languages are in them, how well a line separates them: against direct computation."""

import json

import pytest
import torch

from megatron_moe_lpr.allocation.dense_source import open_dense_source
from megatron_moe_lpr.allocation.ffn_inputs import ffn_inputs
from megatron_moe_lpr.allocation.probe import right_side, separability, separating_direction
from megatron_moe_lpr.allocation.similarity import layer_similarity, mean_unit_vector
from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.errors import UserError
from tests.conversion.helpers import change_hf, perturb, rewrite_checkpoint, run
from tests.conversion.tiny_models import FURTHER_MODELS, MODELS, load_model, save_model
from tests.data.builders import write_dataset
from tests.evaluation.tools import load_tool

CPU = torch.device("cpu")


def windows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randint(99, (11, 20), generator=generator) for name in ("el", "en", "hu")}


@torch.no_grad()
def direct_inputs(directory, ids: torch.Tensor) -> list[torch.Tensor]:
    """By hooks in the whole model."""
    model, kept = load_model(directory), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    model(ids)
    return kept


@pytest.mark.parametrize("name", [*MODELS, *FURTHER_MODELS])
def test_layer_by_layer_is_what_the_whole_model_computes(name, tmp_path):
    save_model(name, tmp_path / "hf")
    layers = list(ffn_inputs(open_dense_source(tmp_path / "hf"), windows(), CPU))
    assert len(layers) == 3
    for language, ids in windows().items():
        for found, expected in zip(layers, direct_inputs(tmp_path / "hf", ids), strict=True):
            torch.testing.assert_close(found[language], expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_gives_the_dense_model_it_came_from(tmp_path):
    save_model("qwen3-tied", tmp_path / "hf")
    run("import", "--hf", tmp_path / "hf", "--save", tmp_path / "moe", "--experts-per-layer", "3,1,2")
    rewrite_checkpoint(tmp_path / "moe", perturb)
    dense, moe = (list(ffn_inputs(open_dense_source(tmp_path / name), windows(), CPU)) for name in ("hf", "moe"))
    for one, other in zip(dense, moe, strict=True):
        assert all(torch.equal(one[language], other[language]) for language in one)


def test_similarity_is_the_mean_cosine_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(5, 7, 16, generator=generator) + 0.3 for name in ("el", "hu", "tr", "en", "es")}

    def pairs(one: str, other: str) -> float:
        first, second = (inputs[name].reshape(-1, 16).double() for name in (one, other))
        return torch.cosine_similarity(first[:, None], second[None], dim=-1).mean().item()

    among = (pairs("el", "hu") + pairs("el", "tr") + pairs("hu", "tr")) / 3
    across = sum(pairs(one, other) for one in ("el", "hu", "tr") for other in ("en", "es")) / 6
    means = {name: mean_unit_vector(part) for name, part in inputs.items()}
    assert layer_similarity(means, ["en", "es"]) == pytest.approx((among + across) / 2, abs=1e-12)
    one_expanded = {name: means[name] for name in ("el", "en")}
    assert layer_similarity(one_expanded, ["en"]) == pytest.approx(pairs("el", "en"), abs=1e-12)


def test_the_direction_that_separates_is_found():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 500, 8, generator=generator)
    truth = torch.tensor([3.0, -1.0, 0, 0, 2.0, 0, 0, 0])
    positive, negative = inputs[inputs @ truth > 0], inputs[inputs @ truth <= 0]
    found = separating_direction([positive[None, :300], positive[None, 300:]], [negative[None]])
    assert torch.cosine_similarity(found, truth, dim=0) > 0.99
    right = right_side(found, {"a": positive, "b": negative}, {"a"})
    assert right["a"].float().mean() > 0.99 and right["b"].float().mean() > 0.99


def test_separability_counts_on_windows_it_was_not_fitted_on():
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(40, 20, 8, generator=generator) for name in ("en", "el")}
    assert separability(noise, ["en"]) == pytest.approx(0.5, abs=0.06)
    apart = {"en": noise["en"] + 3, "el": noise["el"] - 3}
    assert separability(apart, ["en"]) > 0.99


def alike(tensors: dict[str, torch.Tensor]) -> None:
    """Give all tokens a common part, as trained models do."""
    tensors["model.embed_tokens.weight"] += 0.3


@pytest.fixture
def model_and_data(tmp_path):
    save_model("qwen2", tmp_path / "hf")
    change_hf(tmp_path / "hf", alike)
    generator = torch.Generator().manual_seed(5)
    prefixes = []
    for index, language in enumerate(("en", "el", "hu")):
        tokens = torch.randint(9 * index + 1, 9 * index + 6, (6, 60), generator=generator).tolist()
        prefixes.append(write_dataset(tmp_path / language, language, tokens))
    return tmp_path, ["--load", str(tmp_path / "hf"), "--data-path", *prefixes, "--original-languages", "en"]


def allocate_tool(monkeypatch, arguments) -> None:
    tool = load_tool("allocate")
    monkeypatch.setattr("sys.argv", ["allocate_experts.py", *map(str, arguments)])
    tool.main()


def test_the_tool_measures_allocates_and_its_file_is_imported(model_and_data, monkeypatch, capsys):
    root, arguments = model_and_data
    sample = ["--tokens-per-language", 200, "--seq-length", 20, "--budget", 5]
    files = ["--output", root / "allocation.json", "--plot", root / "allocation.svg"]
    allocate_tool(monkeypatch, [*arguments, *sample, *files])
    printed = capsys.readouterr().out
    record = json.loads((root / "allocation.json").read_text())
    experts = record["experts_per_layer"]
    assert f"--experts-per-layer {','.join(map(str, experts))}" in printed
    assert record["new_experts"] == sum(experts) - 3 <= 5
    assert all(0 < value < 1 for value in record["similarity"])
    assert min(record["separability"]) > 0.9  # languages of tokens of their own
    assert (root / "allocation.svg").read_text().count("<rect") == 3
    run("import", "--hf", root / "hf", "--save", root / "moe", "--experts-per-layer", root / "allocation.json")
    assert resolve_checkpoint(root / "moe").card().experts_per_layer == experts


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--tokens-per-language", "100000", "--seq-length", "20"], "tokens, 100,000 are wanted"),
        (["--tokens-per-language", "20", "--seq-length", "20"], "at least two windows"),
        (["--seq-length", "300"], "only 256 positions"),
        (["--original-languages", "en", "el", "hu"], "must hold original languages and expanded ones"),
        (["--original-languages", "enn"], "write en if you mean en .English."),
        (["--original-languages", "fr"], "must hold original languages and expanded ones"),
    ],
)
def test_bad_flags_of_the_tool(model_and_data, monkeypatch, change, words):
    with pytest.raises(UserError, match=words):
        allocate_tool(monkeypatch, [*model_and_data[1], *change])


def test_a_stock_moe_is_refused(tmp_path):
    save_model("qwen3", tmp_path / "hf")
    run("import", "--hf", tmp_path / "hf", "--save", tmp_path / "moe", "--num-experts", 3)
    run("export", "--load", tmp_path / "moe", "--hf", tmp_path / "stock")
    with pytest.raises(UserError, match="has experts"):
        open_dense_source(tmp_path / "stock")
