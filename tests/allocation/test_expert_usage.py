"""Which experts a sample uses, against the router logits of transformers' whole model."""

import pytest
import torch

from megatron_moe_lpr.allocation.expert_usage import expert_usage, most_used_experts, open_mixture_source
from megatron_moe_lpr.allocation.samples import sample_windows
from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.conversion.added_experts import format_experts, most_used, named_experts, random_experts
from megatron_moe_lpr.data.reading.blend import read_blend
from tests.conversion.helpers import run
from tests.conversion.tiny_models import load_model, save_model
from tests.training.runs import make_data

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
