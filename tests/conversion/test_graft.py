"""Grafting an instruct model onto an upcycled base model: which tensors come from where, to the bit."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from tests.conversion.extended import make_tokenizers, save_with_tokenizer
from tests.conversion.fingerprint import checkpoint_fingerprint
from tests.conversion.helpers import (
    assert_same_tensors,
    checkpoint_tensors,
    hf_tensors,
    perturb,
    rewrite_checkpoint,
    run,
)
from tests.conversion.test_extended_commands import change_card, train
from tests.conversion.tiny_models import load_model, logits, save_model
from tests.data.extended_tokenizers import give_tokenizer

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def post_train(base: Path, instruct: Path, changed: float = 0.05) -> Path:
    """Write what post-training could make of a model: every weight a little different, a chat template, another end."""
    instruct.mkdir()
    for file in base.iterdir():
        (instruct / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(3)
    for file in instruct.glob("*.safetensors"):
        tensors = load_file(file)
        changes = {name: changed * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
        changed_tensors = {name: (tensor + changes[name]).to(tensor.dtype) for name, tensor in tensors.items()}
        save_file(changed_tensors, file, metadata={"format": "pt"})
    (instruct / "chat_template.jinja").write_text(TEMPLATE)
    (instruct / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    (instruct / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return instruct


def graft(tmp_path: Path, *flags: object, save: str = "grafted", load: str = "save") -> dict[str, torch.Tensor]:
    models = ("--base", tmp_path / "base", "--instruct", tmp_path / "instruct")
    run("graft", "--load", tmp_path / load, *models, "--save", tmp_path / save, *flags)
    return checkpoint_tensors(tmp_path / save)


def is_expert(key: str) -> bool:
    return ".mlp.experts." in key


@pytest.mark.parametrize(
    ("name", "dtype", "flags"),
    [
        ("qwen2", torch.bfloat16, ("--num-experts", 3)),
        ("qwen2-tied", torch.float32, ("--experts-per-layer", "3,1,4")),
        ("qwen3", torch.bfloat16, ("--num-experts", 4, "--moe-layer-freq", 2)),
        ("llama3-tied", torch.float32, ("--num-experts", 2)),
        ("mistral", torch.bfloat16, ("--num-experts", 3)),
    ],
)
def test_an_untrained_graft_is_the_upcycled_instruct_model(
    name: str, dtype: torch.dtype, flags: tuple, tmp_path: Path
) -> None:
    base = save_model(name, tmp_path / "base", dtype)
    instruct = post_train(base, tmp_path / "instruct")
    run("import", "--hf", base, "--save", tmp_path / "save", *flags)
    run("import", "--hf", instruct, "--save", tmp_path / "expected", *flags)
    found, expected = graft(tmp_path), checkpoint_tensors(tmp_path / "expected")
    shared = {key: tensor for key, tensor in expected.items() if not is_expert(key)}
    assert_same_tensors({key: tensor for key, tensor in found.items() if not is_expert(key)}, shared)
    for key in found.keys() - shared.keys():
        # base + (instruct - base) in float32: equal in bfloat16 but for rounding.
        torch.testing.assert_close(found[key], expected[key], rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-7)
    card, wanted = (resolve_checkpoint(tmp_path / part).card() for part in ("grafted", "expected"))
    assert card.original_fingerprint == wanted.original_fingerprint == checkpoint_fingerprint(tmp_path / "grafted")
    assert [entry["stage"] for entry in card.history] == ["graft"]
    side = resolve_checkpoint(tmp_path / "grafted").side_directory
    for file in ("config.json", "chat_template.jinja", "generation_config.json", "README.md"):
        assert (side / file).read_bytes() == (instruct / file).read_bytes()


def test_its_export_answers_as_the_instruct_model(tmp_path: Path) -> None:
    base = save_model("qwen2", tmp_path / "base")
    post_train(base, tmp_path / "instruct")
    run("import", "--hf", base, "--save", tmp_path / "save", "--num-experts", 4)
    graft(tmp_path)
    run("export", "--load", tmp_path / "grafted", "--hf", tmp_path / "moe")
    assert (logits(load_model(tmp_path / "moe")) - logits(load_model(tmp_path / "instruct"))).abs().max() < 2e-5
    text = (tmp_path / "moe" / "README.md").read_text()
    assert "license: apache-2.0" in text and "| graft |" in text and "are the base model's own weights" in text
    assert json.loads((tmp_path / "moe" / "generation_config.json").read_text())["eos_token_id"] == [7, 8]


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_experts_change_by_exactly_the_difference(scale: float, tmp_path: Path) -> None:
    base = save_model("qwen3", tmp_path / "base", torch.bfloat16)
    post_train(base, tmp_path / "instruct")
    run("import", "--hf", base, "--save", tmp_path / "save", "--num-experts", 3)
    rewrite_checkpoint(tmp_path / "save", perturb)
    before, found = checkpoint_tensors(tmp_path / "save"), graft(tmp_path, "--scale", scale)
    dense = [hf_tensors(tmp_path / part) for part in ("base", "instruct")]
    names = {"linear_fc1.weight_w": "gate_proj", "linear_fc1.weight_v": "up_proj", "linear_fc2.weight": "down_proj"}
    compared = 0
    for key, tensor in found.items():
        if ".router." in key:
            assert torch.equal(tensor, before[key])
        if is_expert(key):
            layer, matrix = key.split(".")[2], ".".join(key.split(".")[-2:])
            first, second = (one[f"model.layers.{layer}.mlp.{names[matrix]}.weight"].float() for one in dense)
            assert torch.equal(tensor, (before[key].float() + scale * (second - first)).bfloat16()), key
            compared += 1
    assert compared == 3 * 2 * 3


def test_a_second_expansion_and_its_opening(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base", torch.bfloat16)
    post_train(base, tmp_path / "instruct")
    run("import", "--hf", base, "--save", tmp_path / "first", "--num-experts", 3)
    rewrite_checkpoint(tmp_path / "first", perturb)
    change_card(tmp_path / "first", history=[{"stage": "1", "languages": ["el"], "original_languages": ["en"]}])
    run("expand", "--load", tmp_path / "first", "--save", tmp_path / "save", "--add-experts", "2,0,2")
    before, found = checkpoint_tensors(tmp_path / "save"), graft(tmp_path)
    key = "decoder.layers.0.mlp.experts.{}.experts.0.linear_fc2.weight"
    first, second = (
        hf_tensors(tmp_path / part)["model.layers.0.mlp.down_proj.weight"].float() for part in ("base", "instruct")
    )
    for group in ("earlier", "newest"):
        name = key.format(group)
        assert torch.equal(found[name], (before[name].float() + (second - first)).bfloat16())
    card = resolve_checkpoint(tmp_path / "grafted").card()
    assert card.expansions == [[2, 2, 2], [2, 0, 2]] and card.openness == 0


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.mark.parametrize("rule", ["difference", "unchanged"])
@pytest.mark.parametrize("name", ["qwen2", "llama3-tied"])
def test_rows_of_new_tokens(name: str, rule: str, tmp_path: Path, tokenizers: Path) -> None:
    """Of two extensions, the second of which is built on tokens of the first."""
    base = save_with_tokenizer(name, tmp_path / "base", tokenizers)
    instruct = post_train(base, tmp_path / "instruct")
    run("import", "--hf", base, "--save", tmp_path / "one", "--num-experts", 2, "--tokenizer", tokenizers / "first")
    train(tmp_path / "one")
    more = ("--add-experts", 1, "--tokenizer", tokenizers / "second")
    run("expand", "--load", tmp_path / "one", "--save", tmp_path / "save", *more)
    before, found = checkpoint_tensors(tmp_path / "save"), graft(tmp_path, "--new-rows", rule)
    record = json.loads((tokenizers / "second" / "extension.json").read_text())
    matrices = {"embedding.new_word_embeddings": "model.embed_tokens.weight"}
    if name == "qwen2":
        matrices["output_layer.new_rows"] = "lm_head.weight"
    for key, matrix in matrices.items():
        change = hf_tensors(instruct)[matrix] - hf_tensors(base)[matrix]
        for number, pieces in enumerate((record["earlier"][0]["pieces"], record["pieces"])):
            more_change = torch.stack([change[ids].mean(dim=0) for ids in pieces])
            expected = before[f"{key}.{number}.weight"] + (more_change if rule == "difference" else 0)
            torch.testing.assert_close(found[f"{key}.{number}.weight"], expected, rtol=1e-6, atol=1e-6)
            change = torch.cat([change, more_change])
    side = resolve_checkpoint(tmp_path / "grafted").side_directory
    assert (side / "tokenizer.json").read_bytes() == (tokenizers / "second" / "tokenizer.json").read_bytes()
    assert (side / "chat_template.jinja").read_text() == TEMPLATE and (side / "extension.json").is_file()


def test_an_instruct_model_with_further_rows(tmp_path: Path) -> None:
    """Rows for special tokens of the chat template, which the base model does not have."""
    base = save_model("qwen2", tmp_path / "base")
    instruct = post_train(base, tmp_path / "instruct")
    for file in instruct.glob("*.safetensors"):
        tensors = load_file(file)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.ones(5, 32)])
        save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((instruct / "config.json").read_text())
    (instruct / "config.json").write_text(json.dumps(config | {"vocab_size": 104}))
    run("import", "--hf", base, "--save", tmp_path / "save", "--num-experts", 2)
    assert graft(tmp_path)["output_layer.weight"].shape == (104, 32)
    run("export", "--load", tmp_path / "grafted", "--hf", tmp_path / "moe")
    assert (logits(load_model(tmp_path / "moe")) - logits(load_model(instruct))).abs().max() < 2e-5


def change_weight(model: Path) -> None:
    file = next(model.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(model: Path, **fields: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | fields))


REFUSALS = {
    "another base": (
        lambda path: change_weight(path / "base"),
        "--base {}/base: not the model .* its weights are others",
    ),
    "another base's settings": (
        lambda path: change_config(path / "base", rms_norm_eps=1e-3),
        "--base {}/base: not the model .* differs in norm_epsilon",
    ),
    "another family": (
        lambda path: save_model("llama", path / "instruct"),
        "--instruct {}/instruct: a llama, and the base model is a qwen2",
    ),
    "tied": (
        lambda path: save_model("qwen2-tied", path / "instruct"),
        "--instruct {}/instruct: tied_embeddings True, and the base model has False",
    ),
    "trained in full": (
        lambda path: change_card(path / "save", history=[{"stage": "full", "languages": ["el"]}]),
        "--load .*: a run with --stage full has trained the base model's own weights",
    ),
    "not finite": (
        lambda path: change_config(path / "instruct", vocab_size=98),
        "config.json wants",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case: str, tmp_path: Path, refuse: Callable[..., str]) -> None:
    base = save_model("qwen2", tmp_path / "base")
    change, words = REFUSALS[case]
    run("import", "--hf", base, "--save", tmp_path / "save", "--num-experts", 2)
    post_train(base, tmp_path / "instruct")
    if "family" in case or "tied" in case:
        for file in (tmp_path / "instruct").iterdir():
            file.unlink()
    change(tmp_path)
    models = ("--base", tmp_path / "base", "--instruct", tmp_path / "instruct")
    line = refuse("graft", "--load", tmp_path / "save", *models, "--save", tmp_path / "grafted")
    assert re.search(words.format(re.escape(str(tmp_path))), line), line
    assert not (tmp_path / "grafted").exists()


def test_what_trained_the_base_model_before_it_was_upcycled_does_not_count(
    tmp_path: Path, refuse: Callable[..., str]
) -> None:
    """A base model that this project has trained: its export records the run, and so does what is upcycled from it."""
    run("import", "--hf", save_model("qwen2", tmp_path / "random"), "--save", tmp_path / "dense", "--num-experts", 1)
    full = {"stage": "full", "languages": ["en"]}
    change_card(tmp_path / "dense", history=[full])
    run("export", "--load", tmp_path / "dense", "--hf", tmp_path / "base")
    run("import", "--hf", tmp_path / "base", "--save", tmp_path / "save", "--num-experts", 2)
    post_train(tmp_path / "random", tmp_path / "instruct")
    grafted = graft(tmp_path)
    run("import", "--hf", tmp_path / "instruct", "--save", tmp_path / "expected", "--num-experts", 2)
    assert_same_tensors(
        {key: tensor for key, tensor in checkpoint_tensors(tmp_path / "expected").items() if "router" not in key},
        {key: tensor for key, tensor in grafted.items() if "router" not in key},
    )
    change_card(tmp_path / "save", history=[full, full])
    models = ("--base", tmp_path / "base", "--instruct", tmp_path / "instruct", "--save", tmp_path / "again")
    assert "a run with --stage full has trained" in refuse("graft", "--load", tmp_path / "save", *models)


def test_a_dense_checkpoint_and_another_tokenizer_are_refused(
    tmp_path: Path, tokenizers: Path, refuse: Callable[..., str]
) -> None:
    base = save_with_tokenizer("qwen2", tmp_path / "base", tokenizers)
    instruct = post_train(base, tmp_path / "instruct")
    models = ("--base", base, "--instruct", instruct, "--save", tmp_path / "grafted")
    run("import", "--hf", base, "--save", tmp_path / "dense", "--num-experts", 1)
    assert "has no new experts to graft onto" in refuse("graft", "--load", tmp_path / "dense", *models)
    run("import", "--hf", base, "--save", tmp_path / "save", "--num-experts", 2)
    flags = ("--num-experts", 2, "--tokenizer", tokenizers / "first")
    run("import", "--hf", base, "--save", tmp_path / "extended", *flags)
    give_tokenizer(instruct, tokenizers / "second")
    (instruct / "extension.json").unlink()
    assert "splits 'Γειά σου" in refuse("graft", "--load", tmp_path / "save", *models)
    assert "is not the one that was extended" in refuse("graft", "--load", tmp_path / "extended", *models)
