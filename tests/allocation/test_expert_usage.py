"""Which experts a sample uses, against the router logits of transformers' whole model."""

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_moe_lpr.allocation.dense_source import open_dense_source
from megatron_moe_lpr.allocation.expert_usage import expert_usage, most_used_experts
from megatron_moe_lpr.allocation.ffn_inputs import ffn_inputs
from megatron_moe_lpr.allocation.mixture_source import open_mixture_in_checkpoint, open_mixture_source
from megatron_moe_lpr.allocation.samples import sample_windows
from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.conversion.added_experts import format_experts, most_used, named_experts, random_experts
from megatron_moe_lpr.data.reading.blend import read_blend
from megatron_moe_lpr.errors import UserError
from tests.conversion.helpers import checkpoint_tensors, run
from tests.conversion.tiny_models import load_model, save_model
from tests.training.runs import make_data
from tests.training.test_second_expansion import FIRST, change_card

WINDOWS = {"el": torch.arange(0, 96).view(3, 32), "hu": torch.arange(1, 97).flip(0).view(3, 32)}
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "granitemoe"])
def test_usage_is_that_of_the_whole_model(name, tmp_path):
    save_model(name, tmp_path)
    source, model = open_mixture_source(tmp_path), load_model(tmp_path)
    with torch.no_grad():
        layers = model(torch.cat([*WINDOWS.values()]), output_router_logits=True).router_logits
    found = list(expert_usage(source, WINDOWS, CPU))
    for usage, logits in zip(found, layers, strict=True):
        chosen = logits.view(-1, 8).topk(model.config.num_experts_per_tok).indices
        assert usage.tolist() == [(chosen == expert).sum() for expert in range(8)]
    copied = most_used_experts(source, [2, 0, 1, 9], WINDOWS, CPU)
    assert [len(experts) for experts in copied] == [2, 0, 1, 9]
    for experts, usage in zip(copied, found, strict=True):
        assert experts[:1] == [int(usage.argmax())][: len(experts)]
    assert copied[3][8] == copied[3][0] and sorted(copied[3][:8]) == list(range(8))
    assert named_experts(format_experts(copied), [2, 0, 1, 9], [8] * 4) == copied


def test_expand_takes_the_same_rules(tmp_path, capsys):
    """Of the base model inside a checkpoint the sample uses what it uses of the mixture itself, new tokens included."""
    prefixes = make_data(tmp_path)
    save_model("qwen2_moe", tmp_path / "hf")
    run("import", "--hf", tmp_path / "hf", "--save", tmp_path / "first", "--add-experts", "2,0,1,2")
    change_card(tmp_path / "first", openness=1.0, history=[FIRST])
    expand = ("expand", "--load", tmp_path / "first", "--save", tmp_path / "second", "--add-experts", "1,2,0,2")
    sample = ("--sample", prefixes["hu"], "--sample-tokens", 1024)
    run(*expand, *sample)
    entry = resolve_checkpoint(tmp_path / "second").card().history[-1]
    windows = sample_windows(read_blend([prefixes["hu"]]), 1024, 256)
    mixture = open_mixture_source(tmp_path / "hf")
    assert entry["copied"] == most_used_experts(mixture, [1, 2, 0, 2], windows, CPU)
    inside = open_mixture_in_checkpoint(tmp_path / "first")
    for layer in range(4):
        expected, found = mixture.layer(layer), inside.layer(layer)
        assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    run(*expand, "--overwrite", "--new-experts-from", "3;7,0;;1,1")
    assert resolve_checkpoint(tmp_path / "second").card().history[-1]["copied"] == [[3], [7, 0], [], [1, 1]]
    old, new = checkpoint_tensors(tmp_path / "first"), checkpoint_tensors(tmp_path / "second")
    mlp, matrix = "decoder.layers.1.mlp", "linear_fc1.weight_w"
    for place, expert in enumerate((7, 0)):
        copy = new[f"{mlp}.experts.newest.experts.{place}.{matrix}"]
        assert torch.equal(copy, old[f"{mlp}.experts.base.experts.{expert}.{matrix}"])
        assert torch.equal(new[f"{mlp}.router.weight"][place], old[f"{mlp}.router.base_rows"][expert])
    for arguments, words in (
        (("--new-experts-from", "8;7,0;;1,1"), "numbers of the 8 experts of layer 0"),
        (("--new-experts-from", "used-most"), "that needs --sample"),
        ((*sample, "--new-experts-from", "random"), "--sample goes with --new-experts-from used-most"),
        ((*sample, "--add-experts", "0"), "not all 0"),
    ):
        with pytest.raises(SystemExit):
            run(*expand, "--overwrite", *arguments)
        assert words in capsys.readouterr().err


def test_expand_of_a_dense_base_copies_the_original_expert(tmp_path, capsys):
    save_model("qwen2", tmp_path / "hf")
    run("import", "--hf", tmp_path / "hf", "--save", tmp_path / "first", "--num-experts", 3)
    change_card(tmp_path / "first", history=[FIRST])
    expand = ("expand", "--load", tmp_path / "first", "--save", tmp_path / "second", "--add-experts", 2)
    prefix = make_data(tmp_path)["el"]
    for arguments in (("--new-experts-from", "0,1"), ("--sample", prefix, "--sample-tokens", 1024)):
        with pytest.raises(SystemExit):
            run(*expand, *arguments)
        assert "is for a base model that is a mixture" in capsys.readouterr().err


def test_earlier_transformers_are_refused(tmp_path, capsys, monkeypatch):
    """Version 4 holds each expert by itself, ignores rope_parameters, and has not all classes: one line each."""
    prefix = make_data(tmp_path)["el"]
    save_model("mixtral", tmp_path / "hf")
    save_model("llama3-tied", tmp_path / "dense")
    run("import", "--hf", tmp_path / "dense", "--save", tmp_path / "checkpoint")
    verify = ("verify", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "dense")
    sample = ("--add-experts", 2, "--sample", prefix, "--sample-tokens", 1024)
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    for arguments, words in (
        (("import", "--hf", tmp_path / "hf", "--save", tmp_path / "out", *sample), "--sample: needs the mixtures"),
        (verify, "names its rotary embedding in rope_parameters"),
    ):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert words in (line := capsys.readouterr().err) and "pip install 'transformers>=5'" in line
    assert not (tmp_path / "out").exists()
    monkeypatch.delitem(CONFIG_MAPPING._mapping, "llama")
    windows = {"el": WINDOWS["el"]}
    for act in (lambda: run(*verify), lambda: next(ffn_inputs(open_dense_source(tmp_path / "dense"), windows, CPU))):
        with pytest.raises((SystemExit, UserError)) as error:
            act()
        assert "has no class for 'llama'" in capsys.readouterr().err + str(error.value)


def test_most_used_and_random_ones():
    assert most_used(torch.tensor([3, 9, 9, 1]), 5) == [1, 2, 0, 3, 1]
    drawn = random_experts([3, 0, 10], [8, 8, 8], seed=1)
    assert [len(experts) for experts in drawn] == [3, 0, 10]
    assert len(set(drawn[0])) == 3 and set(drawn[2]) == set(range(8))
    assert drawn == random_experts([3, 0, 10], [8, 8, 8], seed=1) != random_experts([3, 0, 10], [8, 8, 8], seed=2)


def test_import_with_a_sample(tmp_path, capsys):
    """The flags of the command: what the sample uses most is what the new experts copy."""
    prefixes = make_data(tmp_path)
    save_model("qwen3_moe", tmp_path / "hf")
    command = ("import", "--hf", tmp_path / "hf", "--save", tmp_path / "out", "--add-experts", "1,2,0,2")
    sample = ("--sample", prefixes["el"], prefixes["hu"], "--sample-tokens", 1024)
    run(*command, *sample)
    entry = resolve_checkpoint(tmp_path / "out").card().history[0]
    entries = read_blend([prefixes["el"], prefixes["hu"]])
    windows = sample_windows(entries, 1024, 256)
    source = open_mixture_source(tmp_path / "hf")
    assert entry["copied"] == most_used_experts(source, [1, 2, 0, 2], windows, CPU)
    for arguments, words in (
        ((*sample, "--new-experts-from", "random"), "--sample goes with --new-experts-from used-most"),
        (("--new-experts-from", "used-most"), "that needs --sample"),
        ((*sample[:-1], 10**6), "lower --sample-tokens"),
    ):
        with pytest.raises(SystemExit):
            run(*command, "--overwrite", *arguments)
        assert words in capsys.readouterr().err
