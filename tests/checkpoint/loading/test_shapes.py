"""Sizes that a checkpoint's files claim and its tensors don't have: refused before memory is taken for a model."""

import json
from pathlib import Path

import pytest

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.checkpoint.loading.model import load_model, model_shape
from megatron_moe_lpr.checkpoint.loading.shapes import check_sizes
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksums import write_manifest
from megatron_moe_lpr.parallel.layout import ParallelLayout
from tests.conversion.helpers import run
from tests.conversion.tiny_models import save_model

HUGE = 2**24


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sizes")
    save_model("qwen2-tied", root / "hf")
    run("import", "--hf", root / "hf", "--save", root / "checkpoint", "--experts-per-layer", "3,1,3")
    return root / "checkpoint" / "release"


@pytest.fixture
def restored(converted):
    config = converted / "moe_lpr" / "config.json"
    before = config.read_text()
    yield config
    config.write_text(before)
    write_manifest(converted, {})


def test_what_was_converted_fits(converted):
    directory = resolve_checkpoint(converted)
    check_sizes(directory, model_shape(directory))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": HUGE}, "word_embeddings"),
        ({"vocab_size": HUGE}, "word_embeddings"),
        ({"intermediate_size": HUGE}, "linear_fc2"),
        ({"num_key_value_heads": 1}, "linear_qkv"),
        # transformers 5 writes a type for each layer, which then differ in number.
        ({"num_hidden_layers": 10, "layer_types": ["full_attention"] * 10}, "layers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_of_another_model(converted, restored, cpu_platform, values, words):
    restored.write_text(json.dumps(json.loads(restored.read_text()) | values))
    write_manifest(converted, {})
    with pytest.raises(UserError, match=rf"{words}.*(these files belong to another model|copy both again)"):
        load_model(converted, ParallelLayout(), cpu_platform)
