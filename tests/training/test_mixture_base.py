"""A base model that is a mixture: every layout equals one process and the base, and what is its own stays frozen."""

import functools
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.checkpoint.loading.model import load_model
from megatron_moe_lpr.conversion.verification.verify import random_tokens
from megatron_moe_lpr.engine.routing import routers
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind, kind_of
from megatron_moe_lpr.model.forward import compute_logits
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from tests.conversion import tiny_models
from tests.conversion.helpers import checkpoint_tensors, rewrite_checkpoint, run
from tests.conversion.test_mixture_bases import import_mixture, perturb_new
from tests.distributed import rank_pool
from tests.training.one_step import StepCase, run_step
from tests.training.runs import make_data, metrics, train
from tests.training.test_layouts import EP2, FULL, PP2, SELECTIVE, TOLERANCE, TP2, VPP, differences
from tests.training.test_second_expansion import change_card

RANKS = 4
BASES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "granitemoe")
CASES = {
    "TP2xEP2, recompute full": StepCase(TP2 | EP2, recompute=FULL),
    "TP2, expert TP2, recompute selective": StepCase(TP2 | {"expert_tensor_parallel_size": 2}, recompute=SELECTIVE),
    "EP2xPP2": StepCase(EP2 | PP2),
    "EP2, all-gather dispatcher, distributed optimizer": StepCase(
        EP2, dispatcher="allgather", optimizer={"use_distributed_optimizer": True}
    ),
}
LAYOUTS = (TP2 | EP2, EP2 | PP2, VPP | TP2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Each base with new experts in all layers but the third, the same as if trained, and data."""
    root = tmp_path_factory.mktemp("mixtures")
    for name in BASES:
        for place in ("start", "trained"):
            import_mixture(root / name / place, name, "--add-experts", "2,4,0,2")
        trained = root / name / "trained" / "checkpoint"
        rewrite_checkpoint(trained, perturb_new)
        change_card(trained, openness=1.0)
    return root, make_data(root)


def logits(path: Path, layouts: tuple[dict, ...]) -> list[torch.Tensor]:
    """On every rank of a pool: logits at each layout."""
    found = []
    for layout in layouts:
        platform, parallel = select_platform("cpu"), ParallelLayout(**layout)
        initialize_parallel(platform, parallel)
        model = load_model(path, parallel, platform, ComputeOptions())
        found.append(compute_logits(model.chunks, model.config, random_tokens(99, 2, 32), 99).detach())
    return found


@torch.no_grad()
def base_logits(directory: Path) -> torch.Tensor:
    return tiny_models.load_model(directory)(random_tokens(99, 2, 32)).logits


@pytest.mark.parametrize("name", BASES)
def test_step_0_is_the_base_at_every_layout(name, inputs):
    start = inputs[0] / name / "start"
    expected = base_logits(start / "hf")
    single = rank_pool(1).run(logits, start / "checkpoint", ({},))[0][0]
    for found in (single, *rank_pool(RANKS).run(logits, start / "checkpoint", LAYOUTS)[0]):
        assert (found - expected).abs().max() < 2e-6 * max(1.0, expected.abs().max())
    trained = rank_pool(1).run(logits, inputs[0] / name / "trained" / "checkpoint", ({},))[0][0]
    assert (trained - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "olmoe"])
def test_every_layout_equals_one_process(name, inputs):
    """Losses and gradients of stage 1's and the review's losses together."""
    path = inputs[0] / name / "trained" / "checkpoint"
    reference = rank_pool(1).run(run_step, path, StepCase())[0]
    kinds = {kind_of(key) for key in reference.gradients}
    assert kinds == {ParameterKind.ROUTER, ParameterKind.NEW_EXPERTS}
    assert sum(".router." in key for key in reference.gradients) == 3  # the third layer got no new expert
    for case, step in CASES.items():
        for result in rank_pool(RANKS).run(run_step, path, step):
            found = differences(result, reference)
            worst = max(found, key=found.get)
            assert found[worst] < TOLERANCE, f"{case}, {worst}: {found[worst]:.2e}"


@pytest.fixture(scope="module")
def stage_1(inputs, tmp_path_factory):
    """Twenty steps of stage 1 at TP2xEP2 x DP1, from a base with a shared expert whose weights are probabilities."""
    root, data = inputs
    save = tmp_path_factory.mktemp("mixture") / "run"
    changes = {"train_iters": 20, "open_experts_iters": 5, **TP2, **EP2}
    rank_pool(RANKS).run(functools.partial(train, root / "qwen2_moe" / "start" / "checkpoint", save, data, **changes))
    return save


def moved(before: Path, after: Path) -> set[str]:
    """Keys of the model's tensors that differ."""
    before, after = checkpoint_tensors(before), checkpoint_tensors(after)
    model = {key: tensor for key, tensor in before.items() if not key.startswith("optimizer")}
    # TP pads the vocabulary.
    ends = {key: min(len(tensor), len(after[key])) for key, tensor in model.items()}
    return {key for key, end in ends.items() if not torch.equal(model[key][:end], after[key][:end])}


def test_stage_1_moves_new_experts_and_their_router_rows_alone(inputs, stage_1):
    start = inputs[0] / "qwen2_moe" / "start" / "checkpoint"
    changed = moved(start, stage_1)
    assert {kind_of(key) for key in changed} == {ParameterKind.NEW_EXPERTS, ParameterKind.ROUTER}
    assert sum(key.endswith("router.weight") for key in changed) == 3
    assert len(changed) == 3 + (2 + 4 + 2) * 3
    states = [key for key in checkpoint_tensors(stage_1) if key.startswith("optimizer")]
    assert states and not any(part in key for key in states for part in (".base", "shared_experts"))
    card = resolve_checkpoint(stage_1).card()
    assert card.openness == 1 and card.original_fingerprint == resolve_checkpoint(start).card().original_fingerprint
    losses = metrics(stage_1)
    assert losses[20]["lm_loss"] < losses[1]["lm_loss"]
    assert 0 < losses[20]["expert0_probability/expanded"] < 1 == round(losses[1]["expert0_probability/expanded"], 1)


def test_the_review_moves_router_rows_of_new_experts_alone(inputs, stage_1, tmp_path, cpu_platform):
    data = inputs[1]
    # A large coefficient, so that eight steps show the direction of the loss.
    changes = {"stage": "2", "train_iters": 8, "lpr_loss_coeff": 30.0, **EP2}
    review = functools.partial(train, stage_1, tmp_path / "review", data, **changes)
    rank_pool(RANKS).run(review)
    changed = moved(stage_1, tmp_path / "review")
    assert changed == {f"decoder.layers.{layer}.mlp.router.weight" for layer in (0, 1, 3)}
    losses = metrics(tmp_path / "review")
    assert losses[8]["expert0_probability/original"] > losses[1]["expert0_probability/original"]
    assert losses[8]["lpr_loss"] < losses[1]["lpr_loss"]


def test_base_rows_train_where_asked(inputs, tmp_path):
    root, data = inputs
    start = root / "qwen3_moe" / "start" / "checkpoint"
    job = functools.partial(train, start, tmp_path / "run", data, train_iters=2, train_base_router=True)
    rank_pool(1).run(job)
    changed = moved(start, tmp_path / "run")
    assert {kind_of(key) for key in changed} == {ParameterKind.NEW_EXPERTS, *(k for k in ParameterKind if k.is_router)}


def test_gradients_of_base_rows_at_a_layout(inputs):
    """Sequence parallelism splits the tokens of a router; the third layer's has base rows alone."""
    path = inputs[0] / "qwen2_moe" / "trained" / "checkpoint"
    reference = rank_pool(1).run(run_step, path, StepCase(train_base_router=True))[0]
    assert sum(key.endswith("base_rows") for key in reference.gradients) == 4
    for result in rank_pool(RANKS).run(run_step, path, StepCase(TP2 | EP2, train_base_router=True)):
        assert max(differences(result, reference).values()) < TOLERANCE


def likelihoods(path: Path) -> dict[int, tuple[float, float]]:
    """LPR loss and probability of the original experts that the routers record, by layer, over random hidden states."""
    from megatron_moe_lpr.model.moe.token_tags import token_tags

    platform, layout = select_platform("cpu"), ParallelLayout()
    initialize_parallel(platform, layout)
    model = load_model(path, layout, platform, ComputeOptions(), lpr_loss_coeff=1.0)
    found = {}
    ones = torch.ones(2, 16, dtype=torch.bool)
    for layer, router in routers(model.chunks):
        hidden = torch.randn(16, 2, 32, generator=torch.Generator().manual_seed(layer))
        router.statistics.reset()
        router.eval()(hidden, token_tags(ones, ones).transpose(0, 1))
        tokens, probability, chosen, likelihood = router.statistics.sums[0, :4].tolist()
        found[layer] = tuple(value / tokens for value in (likelihood, probability, chosen))
    return found


def test_lpr_loss_is_of_all_original_experts_together(inputs):
    """Against the closed form in float64."""
    path = inputs[0] / "qwen3_moe" / "trained" / "checkpoint"
    tensors = checkpoint_tensors(path)
    for layer, found in rank_pool(1).run(likelihoods, path)[0].items():
        router = f"decoder.layers.{layer}.mlp.router"
        rows = [tensors[f"{router}.{part}"] for part in ("base_rows", "weight") if f"{router}.{part}" in tensors]
        hidden = torch.randn(16, 2, 32, generator=torch.Generator().manual_seed(layer)).view(-1, 32)
        probabilities = torch.softmax(hidden.double() @ torch.cat(rows).double().T, dim=-1)
        original = probabilities[:, :8].sum(dim=-1)
        choices = probabilities.topk(3).indices
        expected = (-original.log().mean(), original.mean(), (choices < 8).double().mean())
        assert found == pytest.approx([value.item() for value in expected], rel=1e-5)


def test_a_second_expansion_is_exact_and_its_groups_follow(inputs, tmp_path, capsys):
    trained, second = inputs[0] / "qwen3_moe" / "trained" / "checkpoint", tmp_path / "second"
    change_card(trained, history=[{"stage": "1", "languages": ["el"], "original_languages": ["en"]}])
    expand = ("expand", "--load", trained, "--save", second, "--add-experts")
    with pytest.raises(SystemExit):
        run(*expand, "0,0,3,0", "--expert-model-parallel-size", 3)
    assert "must divide the 8 experts of the base model and the 2 new ones" in capsys.readouterr().err
    run(*expand, "2,0,4,2", "--expert-model-parallel-size", 2)
    card = resolve_checkpoint(second).card()
    assert card.expansions == [[2, 4, 0, 2], [2, 0, 4, 2]] and card.experts_per_layer == [12, 12, 12, 12]
    before, after = (rank_pool(1).run(logits, path, ({},))[0][0] for path in (trained, second))
    assert (after - before).abs().max() < 1e-5
    assert (rank_pool(RANKS).run(logits, second, (TP2 | EP2,))[0][0] - before).abs().max() < 1e-4
    old, new = checkpoint_tensors(trained), checkpoint_tensors(second)
    for layer, (earlier, newest) in enumerate(zip(*card.expansions, strict=True)):
        mlp = f"decoder.layers.{layer}.mlp"
        for place in range(earlier):
            key = f"experts.{place}.linear_fc2.weight"
            assert torch.equal(new[f"{mlp}.experts.earlier.{key}"], old[f"{mlp}.experts.newest.{key}"])
        rows = new[f"{mlp}.router.weight"]
        assert len(rows) == earlier + newest
        assert earlier == 0 or torch.equal(rows[:earlier], old[f"{mlp}.router.weight"])
    change_card(second, openness=1.0)
    reference = rank_pool(1).run(run_step, second, StepCase(), torch.tensor([0, 1, -1, -1]))[0]
    assert not any(".earlier." in key or ".base" in key for key in reference.gradients)
    for result in rank_pool(RANKS).run(run_step, second, StepCase(TP2 | EP2), torch.tensor([0, 1, -1, -1])):
        assert max(differences(result, reference).values()) < TOLERANCE
