"""Experts that were trained elsewhere: import records their languages, and expand goes on from there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.commands import plan
from megatron_moe_lpr.data.language_groups import groups_with_prior, learned_languages, original_languages
from megatron_moe_lpr.errors import UserError
from tests.conversion.helpers import checkpoint_tensors, run
from tests.conversion.test_experts import write_adapter
from tests.conversion.tiny_models import make_model

Dense = Callable[[str], Path]

LANGUAGES = ("--original-languages", "en", "Spanish", "zh", "--expanded-languages", "EL,hun")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "adapter", make_model("qwen2"), [0, 2])
    return tmp_path / "adapter"


def history(checkpoint: Path) -> list[dict]:
    return resolve_checkpoint(checkpoint).card().history


def test_an_imported_adapter_is_expanded(
    adapter: Path, dense_directory: Dense, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, save = dense_directory("qwen2"), tmp_path / "save"
    run("import", "--hf", base, "--adapter", adapter, "--save", save, *LANGUAGES)
    output = capsys.readouterr().out
    assert "Spanish is read as es" in output and "hun is read as hu" in output
    fields = {"languages": ["el", "hu"], "original_languages": ["en", "es", "zh"]}
    assert history(save) == [{"stage": "imported adapter", "source": "adapter", **fields}]
    run("expand", "--load", save, "--save", tmp_path / "more", "--add-experts", 2)
    card = resolve_checkpoint(tmp_path / "more").card()
    assert card.experts_per_layer == [6, 1, 6] and card.expansions == [[3, 0, 3], [2, 0, 2]] and card.openness == 0
    assert groups_with_prior(card.history, [], 3) == [["en", "es", "zh"], ["el", "hu"]]
    before, after = checkpoint_tensors(save), checkpoint_tensors(tmp_path / "more")
    for key, tensor in before.items():
        found = after[key.replace("mlp.experts.experts.", "mlp.experts.earlier.experts.")]
        assert torch.equal(found[: len(tensor)], tensor), key
    trained = [*card.history, {"stage": "1", "languages": ["tr", "el"], "original_languages": []}]
    assert learned_languages(trained) == [{"el", "hu"}, {"tr"}]


def test_the_export_knows_them_and_its_import_too(adapter: Path, dense_directory: Dense, tmp_path: Path) -> None:
    run("import", "--hf", dense_directory("qwen2"), "--adapter", adapter, "--save", tmp_path / "save", *LANGUAGES)
    run("export", "--load", tmp_path / "save", "--hf", tmp_path / "moe")
    text = (tmp_path / "moe" / "README.md").read_text()
    assert "Original languages: en, es, zh" in text and "Expanded languages: el, hu" in text
    run("import", "--hf", tmp_path / "moe", "--save", tmp_path / "again")
    assert history(tmp_path / "again") == history(tmp_path / "save")


def test_the_remedies_that_expand_names(
    adapter: Path,
    dense_directory: Dense,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    refuse: Callable[..., str],
) -> None:
    """An adapter without languages, then the same as an export of that, and a stock MoE without a card."""
    run("import", "--hf", dense_directory("qwen2"), "--adapter", adapter, "--save", tmp_path / "save")
    assert "note: --original-languages and --expanded-languages would record" in capfd.readouterr().out
    line = refuse("expand", "--load", tmp_path / "save", "--save", tmp_path / "more", "--add-experts", 2)
    assert "import it again with --original-languages and --expanded-languages" in line
    run("export", "--load", tmp_path / "save", "--hf", tmp_path / "moe")
    shutil.copytree(tmp_path / "moe", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "moe_lpr")
    for source in ("moe", "bare"):
        run("import", "--hf", tmp_path / source, "--save", tmp_path / f"{source}-save", *LANGUAGES)
        found = history(tmp_path / f"{source}-save")
        assert found[-1]["stage"] == "imported mixture" and learned_languages(found) == [{"el", "hu"}]
        assert original_languages(found) == {"en", "es", "zh"}
        more = tmp_path / f"{source}-more"
        run("expand", "--load", tmp_path / f"{source}-save", "--save", more, "--add-experts", "2,0,2")


def test_a_base_that_the_adapter_does_not_name(
    adapter: Path, dense_directory: Dense, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    for named, noted in (("org/qwen2", False), ("org/Other-7B", True)):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
        arguments = ("--adapter", adapter, "--save", tmp_path / "save", "--overwrite", *LANGUAGES)
        run("import", "--hf", dense_directory("qwen2"), *arguments)
        assert (f"the adapter names {named} as its base, and --hf is qwen2" in capsys.readouterr().out) == noted


@pytest.mark.parametrize(
    ("source", "flags", "words"),
    [
        ("dense", LANGUAGES, "is dense and gets new experts; training records"),
        ("adapter", LANGUAGES[:4], "give both or neither"),
        ("adapter", LANGUAGES[4:], "give both or neither"),
        ("adapter", (*LANGUAGES, "en-GB"), "en-GB is among --original-languages too"),
        ("adapter", (*LANGUAGES, "Hungarain"), "--expanded-languages Hungarain"),
    ],
)
def test_refused(
    source: str,
    flags: tuple,
    words: str,
    adapter: Path,
    dense_directory: Dense,
    tmp_path: Path,
    refuse: Callable[..., str],
) -> None:
    more = ("--adapter", adapter) if source == "adapter" else ()
    assert words in refuse("import", "--hf", dense_directory("qwen2"), *more, "--save", tmp_path / "save", *flags)


def test_known_languages_are_not_said_again(
    adapter: Path, dense_directory: Dense, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    run("import", "--hf", dense_directory("qwen2"), "--adapter", adapter, "--save", tmp_path / "save", *LANGUAGES)
    run("export", "--load", tmp_path / "save", "--hf", tmp_path / "moe")
    card = json.loads((tmp_path / "moe" / "moe_lpr" / "card.json").read_text())
    assert card["history"][0]["languages"] == ["el", "hu"]
    line = refuse("import", "--hf", tmp_path / "moe", "--save", tmp_path / "again", *LANGUAGES)
    assert "knows its languages; leave the flag out" in line


GENUINE = {
    "Qwen3-MoE": transformers.Qwen3MoeConfig,
    "Qwen2-MoE": transformers.Qwen2MoeConfig,
    "Mixtral": transformers.MixtralConfig,
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}


@pytest.mark.parametrize("name", GENUINE)
def test_a_model_that_was_trained_as_a_mixture_is_not_taken_for_an_upcycled_one(
    name: str, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    """Its expert 0 is no original, and training the others would overwrite the model."""
    transformers.AutoModelForCausalLM.from_config(GENUINE[name](**SIZES)).save_pretrained(tmp_path / "genuine")
    line = refuse("import", "--hf", tmp_path / "genuine", "--save", tmp_path / "save")
    assert f"{tmp_path / 'genuine'}: a mixture" in line and "--add-experts" in line
    with pytest.raises(UserError, match="is a mixture; say with --add-experts"):
        plan.find(plan.Flags(gpus=8, hf=str(tmp_path / "genuine")))
