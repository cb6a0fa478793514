"""`plan --hf` and `allocate --hf` by a name on the hub: the real client against a stand-in on this machine."""

import json
from pathlib import Path

import pytest

from megatron_moe_lpr import cli
from megatron_moe_lpr.commands.allocate import Flags, find_model
from megatron_moe_lpr.errors import UserError
from tests.conversion.hugging_face.test_hub import NAME, dense, model_hub, start
from tests.data.builders import write_dataset
from tests.data.preparation.hub_server import serve

__all__ = ["dense"]
PLAN = ("plan", "--num-experts", "2", "--gpus", "1", "--global-batch-size", "8", "--seq-length", "32")


def test_plan_downloads_config_json_alone_and_needs_no_weights(tmp_path, dense, capsys):
    hub = model_hub(dense)
    hub.files[NAME].pop("model.safetensors")
    with serve(hub) as endpoint:
        named = start(endpoint, tmp_path, *PLAN, "--hf", NAME, "--revision", "main")
    assert named.returncode == 0, named.stderr
    assert [path for path, _ in hub.sent] == ["config.json"]
    offline = start("", tmp_path, *PLAN, "--hf", NAME, HF_HUB_OFFLINE="1")
    assert named.stdout == offline.stdout and "Parameters: " in named.stdout
    cli.main([*PLAN, "--hf", str(dense / "config.json")])
    assert capsys.readouterr().out.split() == named.stdout.split()


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (("plan", "--hf", "someone/else"), {}, "--hf someone/else: no such directory, and as a name on the Hugging"),
        (("plan", "--hf", "someone/pickles"), {}, "someone/pickles: "),
        (("plan", "--hf", NAME), {"HF_HUB_OFFLINE": "1"}, f"{NAME}: the hub does not answer"),
        (("plan", "--hf", NAME, "--load", "x"), {}, "give either --hf, a dense Hugging Face model, or --load"),
        (("plan", "--load", "x", "--revision", "main"), {}, "--revision: is for a name on the hub, given by --hf"),
    ],
)
def test_failures_are_one_line_before_anything_is_sent(tmp_path, dense, words, settings, message):
    hub = model_hub(dense)
    with serve(hub) as endpoint:
        done = start(endpoint, tmp_path, *words, "--gpus", "1", **settings)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and message in errors[0], done.stderr
    assert hub.sent == []


def test_a_model_that_asks_for_consent_is_named_with_its_page(tmp_path, dense):
    hub = model_hub(dense)
    hub.gated.add(NAME)
    with serve(hub) as endpoint:
        done = start(endpoint, tmp_path, *PLAN, "--hf", NAME)
    assert done.returncode == 1 and f"accept its conditions at {endpoint}/{NAME}" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"hf": NAME, "load": Path("x")}, "give either --hf, a dense Hugging Face model, or --load"),
        ({}, "give either --hf, a dense Hugging Face model, or --load"),
        ({"load": Path("x"), "revision": "main"}, "--revision: is for a name on the hub, given by --hf"),
    ],
)
def test_allocate_takes_one_model(flags, message):
    with pytest.raises(UserError, match=message):
        find_model(Flags(data_path=["x"], original_languages=["en"], **flags))


def test_allocate_measures_a_model_of_the_hub(tmp_path, dense):
    tokens = {"en": [[1, 2, 3, 4, 5] * 12] * 4, "el": [[11, 12, 13, 14, 15] * 12] * 4}
    prefixes = [write_dataset(tmp_path / language, language, text) for language, text in tokens.items()]
    sample = ("--tokens-per-language", "100", "--seq-length", "20", "--original-languages", "en", "--budget", "3")
    words = ("allocate", "--data-path", *prefixes, *sample)
    hub = model_hub(dense)
    with serve(hub) as endpoint:
        named = start(endpoint, tmp_path, *words, "--hf", NAME, "--output", tmp_path / "named.json")
    assert named.returncode == 0 and "downloading" in named.stderr, named.stderr
    cli.main([*map(str, words), "--load", str(dense), "--output", str(tmp_path / "directory.json")])
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("named", "directory")]
    assert records[0] == records[1] and records[0]["new_experts"] == 3
