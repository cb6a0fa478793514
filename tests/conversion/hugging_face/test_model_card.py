"""Model card, generation settings, licences and chat templates of an export."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard
from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.conversion.hugging_face.model_card import ModelCardOptions, model_card
from megatron_moe_lpr.files.checksum_file import write_checksums
from tests.conversion.helpers import run
from tests.conversion.tiny_models import save_model

Export = Callable[..., tuple[dict, str]]
HISTORY = [
    {"stage": 1, "languages": ["el", "tr"], "original_languages": ["en"], "tokens": 1234567, "iterations": 10},
    {"stage": 2, "languages": ["el", "en", "tr"], "original_languages": ["en"], "tokens": 89, "iterations": 3},
]

MIXTURE = {"family": "qwen3_moe", "experts_per_layer": [6, 6], "expansions": [[2, 2]]}
"""Fields of a card whose base model had 4 experts in each layer."""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model with a model card, licences and chat templates."""
    dense = save_model("llama", tmp_path / "dense")
    card = "---\nlicense: llama3.2\nlanguage: [en, de]\nlicense_link: LICENSE.txt\n---\n# Base\n"
    (dense / "README.md").write_text(card)
    for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md", "tekken.json"):
        (dense / name).write_text(name)
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (dense / "generation_config.json").unlink()
    return dense


@pytest.fixture
def export(base: Path, tmp_path: Path) -> Export:
    """Import, record a training history, export with these flags; return metadata and text of the model card."""

    def call(*flags: object) -> tuple[dict, str]:
        run("import", "--hf", base, "--save", tmp_path / "save", "--num-experts", 3, "--overwrite")
        card = resolve_checkpoint(tmp_path / "save").side_directory / "card.json"
        card.write_text(json.dumps(json.loads(card.read_text()) | {"history": HISTORY}))
        write_checksums(card.parents[1], {})
        run("export", "--load", tmp_path / "save", "--hf", tmp_path / "moe", "--overwrite", *flags)
        _, front, text = (tmp_path / "moe" / "README.md").read_text().split("---\n", 2)
        return yaml.safe_load(front), text

    return call


def test_metadata_and_text(export: Export) -> None:
    metadata, text = export("--base-model", "meta-llama/Llama-3.2-1B")
    assert metadata == {
        "language": ["el", "en", "tr"],
        "license": "llama3.2",
        "license_link": "LICENSE.txt",
        "base_model": "meta-llama/Llama-3.2-1B",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe-lpr", "moe"],
    }
    for words in (
        "Original languages: en",
        "Expanded languages: el, tr",
        "| 1 | el tr | 1,234,567 | 10 |",
        "vllm serve",
        "python -m vllm.entrypoints.openai.api_server --model",
    ):
        assert words in text, words
    assert "in 3 of 3 layers" in text and "3 experts, of which each token uses 2" in text


@pytest.mark.parametrize(("changed", "has_form"), [({}, True), ({"family": "granite"}, False), (MIXTURE, False)])
def test_the_form_for_llama_cpp_is_named_where_export_writes_it(changed: dict, has_form: bool, tmp_path: Path) -> None:
    card = CheckpointCard(family="llama", experts_per_layer=[3, 3], top_k=2, dtype="float32", original_fingerprint="")
    card = dataclasses.replace(card, **changed)
    text = model_card(tmp_path, None, card, "transformers", ModelCardOptions(), is_original=True)
    assert ("export --for llama.cpp" in text, "llama.cpp has not been tried" in text) == (has_form, not has_form)


def test_files_that_must_travel(export: Export, base: Path, tmp_path: Path) -> None:
    export()
    names = ("LICENSE.txt", "NOTICE", "USE_POLICY.md", "tekken.json", "additional_chat_templates/tool_use.jinja")
    for name in names:
        assert (tmp_path / "moe" / name).read_bytes() == (base / name).read_bytes(), name
    config = json.loads((base / "config.json").read_text())
    generation = json.loads((tmp_path / "moe" / "generation_config.json").read_text())
    assert generation == {name: config[name] for name in ("bos_token_id", "eos_token_id")}


def test_licence_without_a_card(export: Export, base: Path) -> None:
    (base / "README.md").unlink()
    metadata, _ = export()
    assert metadata["license"] == "other" and metadata["license_link"] == "LICENSE.txt" and metadata["license_name"]
    (base / "LICENSE.txt").unlink()
    assert export()[0]["license"] == "unknown"
    assert export("--licence", "apache-2.0")[0]["license"] == "apache-2.0"


def test_an_export_imported_again_keeps_licence_and_base(export: Export, base: Path, tmp_path: Path) -> None:
    export("--base-model", "some/model")
    run("import", "--hf", tmp_path / "moe", "--save", tmp_path / "again")
    run("export", "--load", tmp_path / "again", "--hf", tmp_path / "moe-again")
    front = (tmp_path / "moe-again" / "README.md").read_text().split("---\n")[1]
    metadata = yaml.safe_load(front)
    assert (metadata["license"], metadata["base_model"]) == ("llama3.2", "some/model")


def test_evaluation(export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "evaluation.json"
    dataset = {"language": "el", "group": "expanded", "perplexity": 12.3456, "bits_per_byte": None}
    file.write_text(json.dumps({"sequence_length": 256, "datasets": [dataset]}))
    assert "| el | expanded | 12.346 |  |" in export("--evaluation", file)[1]
    file.write_text("{}")
    with pytest.raises(SystemExit):
        export("--evaluation", file)
    assert "evaluation.json: not a result of moe-lpr evaluate" in capsys.readouterr().err
