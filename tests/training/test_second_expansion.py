"""A second expansion: exact at step 0, earlier experts frozen to the bit, every layout equal to one process."""

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_moe_lpr.checkpoint.format.card import read_card
from megatron_moe_lpr.checkpoint.format.directory import CARD_FILE, resolve_checkpoint
from megatron_moe_lpr.checkpoint.loading.model import load_model
from megatron_moe_lpr.conversion.verification.verify import random_tokens
from megatron_moe_lpr.files.checksum_file import write_checksums
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind, kind_of
from megatron_moe_lpr.model.forward import compute_logits
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from megatron_moe_lpr.training.setup import Run
from tests.conversion.fingerprint import checkpoint_fingerprint
from tests.conversion.helpers import checkpoint_tensors, perturb, rewrite_checkpoint, run
from tests.distributed import rank_pool
from tests.training.one_step import StepCase, run_step
from tests.training.outcomes import train_outcome
from tests.training.runs import make_checkpoint, make_data, metrics, rewind, train
from tests.training.test_layouts import EP2, FULL, PP2, TOLERANCE, TP2, differences

FIRST = {"stage": "1", "languages": ["el"], "original_languages": ["en"]}
GROUPS = torch.tensor([0, 1, -1, -1])  # of one_step's three languages: original, first expansion, latest; padding
RANKS = 4  # Always: what remains is DP. Each further number of ranks would start processes of its own.
LAYOUTS = {
    "TP2xEP2, recompute full": StepCase(TP2 | EP2, recompute=FULL),
    "EP2, all-gather dispatcher, distributed optimizer": StepCase(
        EP2, dispatcher="allgather", optimizer={"use_distributed_optimizer": True}
    ),
    "TP2xPP2": StepCase(TP2 | PP2),
    "EP2xPP2": StepCase(EP2 | PP2),
}


def change_card(checkpoint: Path, **changes) -> None:
    directory = resolve_checkpoint(checkpoint)
    path = directory.side_directory / CARD_FILE
    dataclasses.replace(read_card(path), **changes).write(path)
    write_checksums(directory.path, {})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model that learned el after its first expansion, the same expanded, the latter as if trained; data."""
    root = tmp_path_factory.mktemp("growing")
    make_checkpoint(root, experts=1)
    run("import", "--hf", root / "hf", "--save", root / "first", "--experts-per-layer", "3,1,5,3")
    rewrite_checkpoint(root / "first", perturb)
    change_card(root / "first", history=[FIRST])
    run("expand", "--load", root / "first", "--save", root / "second", "--add-experts", "2,2,0,4")
    run("expand", "--load", root / "first", "--save", root / "trained", "--add-experts", "2,2,0,4")
    rewrite_checkpoint(root / "trained", perturb)
    change_card(root / "trained", openness=1.0)
    return root, make_data(root)


def logits(path: Path, layout: dict) -> torch.Tensor:
    """On every rank of a pool."""
    platform, parallel = select_platform("cpu"), ParallelLayout(**layout)
    initialize_parallel(platform, parallel)
    model = load_model(path, parallel, platform, ComputeOptions())
    return compute_logits(model.chunks, model.config, random_tokens(99, 2, 32), 99).detach()


def test_step_0_is_exact(inputs):
    root, _ = inputs
    card = resolve_checkpoint(root / "second").card()
    assert card.experts_per_layer == [5, 3, 5, 7] and card.openness == 0
    assert card.expansions == [[2, 0, 4, 2], [2, 2, 0, 4]]
    before = rank_pool(1).run(logits, root / "first", {})[0]
    after = rank_pool(1).run(logits, root / "second", {})[0]
    assert (after - before).abs().max() < 1e-5
    spread = rank_pool(RANKS).run(logits, root / "second", TP2 | EP2)[0]
    assert (spread - before).abs().max() < 1e-4
    opened = rank_pool(1).run(logits, root / "trained", {})[0]
    assert (opened - before).abs().max() > 0.01


def test_what_is_copied(inputs):
    root, _ = inputs
    before, after = (checkpoint_tensors(root / name) for name in ("first", "second"))
    router = "decoder.layers.0.mlp.router.weight"
    assert torch.equal(after[router][:3], before[router]) and after[router].shape == (5, 32)
    experts = "decoder.layers.0.mlp.experts"
    for matrix in ("linear_fc1.weight_w", "linear_fc1.weight_v", "linear_fc2.weight"):
        for index in range(2):
            old = before[f"{experts}.experts.{index}.{matrix}"]
            assert torch.equal(after[f"{experts}.earlier.experts.{index}.{matrix}"], old)
            original = before[f"decoder.layers.0.mlp.original_expert.{matrix}"]
            assert torch.equal(after[f"{experts}.newest.experts.{index}.{matrix}"], original)
    rows = {"new vocabulary rows", "earlier vocabulary rows"}
    absent = rows | {"dense FFN", "inserted blocks", "base experts", "base router rows", "shared expert"}
    assert {kind_of(key) for key in after} == set(ParameterKind) - absent
    assert "decoder.layers.2.mlp.experts.earlier.experts.3.linear_fc2.weight" in after
    assert "decoder.layers.1.mlp.experts.experts.1.linear_fc2.weight" in after  # was dense: one group
    assert checkpoint_fingerprint(root / "second") == resolve_checkpoint(root / "first").card().original_fingerprint


@pytest.fixture(scope="module")
def reference(inputs):
    return rank_pool(1).run(run_step, inputs[0] / "trained", StepCase(), GROUPS)[0]


def test_only_the_latest_experts_and_routers_have_gradients(reference):
    experts = [key for key in reference.gradients if ".experts." in key]
    assert len(experts) == (2 + 2 + 4) * 3 and not any(".earlier." in key for key in experts)
    assert len(reference.gradients) == len(experts) + 4


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name, inputs, reference):
    for result in rank_pool(RANKS).run(run_step, inputs[0] / "trained", LAYOUTS[name], GROUPS):
        found = differences(result, reference)
        worst = max(found, key=found.get)
        assert found[worst] < TOLERANCE, f"{worst}: {found[worst]:.2e}"


@pytest.fixture(scope="module")
def second_run(inputs, tmp_path_factory):
    """Twenty steps of stage 1 on the second group at TP2xEP2 x DP2, saved after 4."""
    root, data = inputs
    save = tmp_path_factory.mktemp("second") / "run"
    changes = {"train_iters": 20, "save_interval": 4, "data_path": [data["hu"]], "open_experts_iters": 8}
    rank_pool(RANKS).run(functools.partial(train, root / "second", save, data, **changes, **TP2, **EP2))
    return save, changes


def check_frozen(before: Path, after: Path) -> None:
    """Nothing but the latest experts and the routers has moved, to the bit, and only they have optimizer state."""
    before, after = checkpoint_tensors(before), checkpoint_tensors(after)
    moved = {key for key, tensor in before.items() if not torch.equal(tensor, after[key][: len(tensor)])}
    assert all(".router." in key or (".experts." in key and ".earlier." not in key) for key in moved)
    assert sum(".router." in key for key in moved) == 4
    assert sum(".newest." in key for key in moved) == (2 + 4) * 3
    state = [key for key in after if key.startswith("optimizer")]
    assert state and not any(".earlier." in key for key in state)


def test_frozen_to_the_bit(inputs, second_run):
    check_frozen(inputs[0] / "second", second_run[0])


def test_frozen_to_the_bit_at_expert_parallel_2(inputs, tmp_path):
    """Twenty steps too, with the distributed optimizer."""
    root, data = inputs
    changes = {"train_iters": 20, "data_path": [data["hu"]], "use_distributed_optimizer": True}
    rank_pool(RANKS).run(functools.partial(train, root / "second", tmp_path / "run", data, **changes, **EP2))
    check_frozen(root / "second", tmp_path / "run")


def test_resume_in_the_middle_of_opening_at_another_layout(inputs, second_run, tmp_path):
    root, data = inputs
    first, changes = second_run
    assert resolve_checkpoint(first / "iter_0000004").card().openness == 0.5
    assert resolve_checkpoint(first).card().openness == 1
    save = rewind(first, tmp_path / "run", 4)
    rank_pool(RANKS).run(functools.partial(train, root / "second", save, data, **changes, **EP2))
    check_frozen(root / "second", save)
    expected, found = metrics(first), metrics(save)
    assert sorted(found) == list(range(5, 21))
    for step in range(5, 11):
        assert found[step]["lm_loss"] == pytest.approx(expected[step]["lm_loss"], rel=2e-5), step


def test_a_lengthened_run_goes_on_opening_as_it_began():
    """By default over a tenth of the steps planned at first, not of those that were added."""
    stage, model = SimpleNamespace(open_experts_iters=None), SimpleNamespace(card=SimpleNamespace(openness=0.0))
    config = SimpleNamespace(stage=stage, batch=SimpleNamespace(train_iters=400))
    run = SimpleNamespace(config=config, model=model, lengths=[40, 400])
    assert [Run.newest_weight(run, step) for step in (0, 1, 4, 5)] == [0, 0.25, 1, 1]


def test_a_run_is_another_one_with_other_experts_or_another_opening(inputs, second_run):
    root, data = inputs
    save, changes = second_run
    for load, other, words in (
        ("first", {"open_experts_iters": None}, "another run (with other experts than --load's)"),
        ("second", {"open_experts_iters": 5}, "another run (open_experts_iters 8 there and 5 here)"),
    ):
        job = functools.partial(train_outcome, root / load, save, data, **changes | other)
        assert words in rank_pool(1).run(job)[0]


def test_a_run_that_saves_what_trains_can_be_expanded_again(inputs, tmp_path):
    """From its base come the frozen experts; both kinds of new experts become earlier ones."""
    root, data = inputs
    save, whole = tmp_path / "run", {"save_trainable_only": True, "train_iters": 2, "data_path": [data["hu"]]}
    rank_pool(RANKS).run(functools.partial(train, root / "second", save, data, **whole, **EP2))
    own = checkpoint_tensors(save)
    assert own and all(".router." in key or ".experts." in key for key in own)
    assert not any(".earlier." in key for key in own)
    run("expand", "--load", save, "--save", tmp_path / "third", "--add-experts", "0,0,2,2")
    third, base = checkpoint_tensors(tmp_path / "third"), checkpoint_tensors(root / "second")
    experts = "decoder.layers.3.mlp.experts"
    known = [(base, f"earlier.experts.{index}") for index in range(2)]
    known += [(own, f"newest.experts.{index}") for index in range(4)]
    for matrix in ("linear_fc1.weight_w", "linear_fc1.weight_v", "linear_fc2.weight"):
        for index, (tensors, key) in enumerate(known):
            found = third[f"{experts}.earlier.experts.{index}.{matrix}"]
            assert torch.equal(found, tensors[f"{experts}.{key}.{matrix}"])
    card = resolve_checkpoint(tmp_path / "third").card()
    assert card.parent is None and card.expansions == [[2, 0, 4, 2], [2, 2, 0, 4], [0, 0, 2, 2]]
    before, after = (rank_pool(1).run(logits, path, {})[0] for path in (save, tmp_path / "third"))
    assert (after - before).abs().max() < 1e-5


def test_the_second_review_and_the_export(inputs, second_run, tmp_path):
    data = inputs[1]
    review = tmp_path / "review"
    for languages, words in (
        (("en", "hu"), "replays the languages of earlier expansions, and none of el"),
        (("el", "hu"), "replays original languages, and --data-path has none of en"),
    ):
        arguments = {"stage": "2", "data_path": [data[name] for name in languages]}
        assert words in rank_pool(1).run(functools.partial(train_outcome, second_run[0], review, data, **arguments))[0]
    everything = {"stage": "2", "train_iters": 2, "original_languages": []}
    rank_pool(RANKS).run(functools.partial(train, second_run[0], review, data, **everything, **EP2))
    before, after = checkpoint_tensors(second_run[0]), checkpoint_tensors(review)
    for key, tensor in before.items():
        if key.startswith("decoder."):
            assert torch.equal(tensor, after[key]) == (".router." not in key), key
    assert resolve_checkpoint(review).card().history[-1]["original_languages"] == ["en"]


def test_export_is_one_stock_moe_and_its_import_knows_the_groups(tmp_path, cpu_platform):
    make_checkpoint(tmp_path, experts=3)
    change_card(tmp_path / "checkpoint", history=[FIRST])
    run("expand", "--load", tmp_path / "checkpoint", "--save", tmp_path / "second", "--add-experts", "2")
    with pytest.raises(SystemExit):
        run("export", "--load", tmp_path / "second", "--hf", tmp_path / "hf2")
    rewrite_checkpoint(tmp_path / "second", perturb)
    change_card(tmp_path / "second", openness=1.0)
    run("export", "--load", tmp_path / "second", "--hf", tmp_path / "hf2")
    run("verify", "--load", tmp_path / "second", "--hf", tmp_path / "hf2", "--tolerance", 1e-4)
    run("import", "--hf", tmp_path / "hf2", "--save", tmp_path / "again")
    before, after = (checkpoint_tensors(tmp_path / name) for name in ("second", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    card = resolve_checkpoint(tmp_path / "again").card()
    assert card.expansions == [[2] * 4, [2] * 4] and card.openness == 1


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("first", ("--add-experts", "0"), "not all 0"),
        ("first", ("--add-experts", "1,2"), "for 4 layers"),
        ("first", ("--add-experts", "x"), "--add-experts x"),
        ("first", ("--add-experts", "3", "--expert-model-parallel-size", 2), "does not divide 3"),
        ("second", ("--add-experts", "2"), "not trained in yet"),
    ],
)
def test_bad_expansions_are_refused(inputs, tmp_path, capsys, name, arguments, words):
    with pytest.raises(SystemExit):
        run("expand", "--load", inputs[0] / name, "--save", tmp_path / "out", *arguments)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
