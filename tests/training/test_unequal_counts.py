"""Layers with different numbers of experts: every layout equals one process, runs resume at other layouts."""

import functools
import json

import pytest

from tests.conversion.helpers import perturb, rewrite_checkpoint, run
from tests.distributed import rank_pool
from tests.evaluation.tools import load_tool
from tests.training.one_step import StepCase, run_step
from tests.training.runs import make_checkpoint, make_data, metrics, rewind, train
from tests.training.test_layouts import EP2, PP2, TOLERANCE, TP2, differences

EXPERTS = [5, 3, 1, 3]
RANKS = 4  # Always: what remains is DP. Each further number of ranks would start processes of its own.
LAYOUTS = {
    "TP2+SP": TP2,
    "EP2": EP2,
    "PP2": PP2,
    "TP2xEP2": TP2 | EP2,
    "TP2xPP2": TP2 | PP2,
    "EP2xPP2": EP2 | PP2,
    "TP2xEP2xPP2": TP2 | EP2 | PP2,
}
RESUMED = {"one process": (1, {}), "TP2xEP2xPP2": (RANKS, TP2 | EP2 | PP2)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A checkpoint with unequal counts, and data."""
    root = tmp_path_factory.mktemp("unequal")
    make_checkpoint(root, experts=1)
    counts = ",".join(map(str, EXPERTS))
    run("import", "--hf", root / "hf", "--save", root / "moe", "--experts-per-layer", counts)
    rewrite_checkpoint(root / "moe", perturb)
    return root / "moe", make_data(root)


@pytest.fixture(scope="module")
def reference(inputs):
    return rank_pool(1).run(run_step, inputs[0], StepCase())[0]


def test_reference_has_every_gradient(reference):
    """Three routers, and three matrices of each of 8 new experts."""
    assert len(reference.gradients) == 3 + 8 * 3


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name, inputs, reference):
    for result in rank_pool(RANKS).run(run_step, inputs[0], StepCase(LAYOUTS[name])):
        found = differences(result, reference)
        worst = max(found, key=found.get)
        assert found[worst] < TOLERANCE, f"{worst}: {found[worst]:.2e}"


@pytest.fixture(scope="module")
def first_run(inputs, tmp_path_factory):
    """Four steps at EP2 x DP2, saved after two."""
    save = tmp_path_factory.mktemp("first") / "run"
    changes = {"save_interval": 2, "train_iters": 4, "use_distributed_optimizer": True}
    rank_pool(RANKS).run(functools.partial(train, inputs[0], save, inputs[1], **changes, **EP2))
    return save


@pytest.mark.parametrize("name", RESUMED)
def test_resume_at_another_layout(name, inputs, first_run, tmp_path):
    world, layout = RESUMED[name]
    save = rewind(first_run, tmp_path / "run", 2)
    changes = {"train_iters": 4, "use_distributed_optimizer": True}
    rank_pool(world).run(functools.partial(train, inputs[0], save, inputs[1], **changes, **layout))
    expected, found = metrics(first_run), metrics(save)
    assert sorted(found) == [3, 4]
    for step, record in found.items():
        for value in ("lm_loss", "grad_norm", "load_balancing_loss"):
            assert record[value] == pytest.approx(expected[step][value], rel=2e-5), (step, value)


def test_evaluation_and_report(inputs, first_run, tmp_path, cpu_platform, monkeypatch):
    arguments = ["--load", str(first_run), "--valid-data-path", *inputs[1].values(), "--original-languages", "en"]
    tool = load_tool("evaluate")
    output = tmp_path / "evaluation.json"
    monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments, "--seq-length", "32", "--output", str(output)])
    tool.main()
    record = json.loads(output.read_text())
    assert record["experts_per_layer"] == EXPERTS
    for dataset in record["datasets"]:
        for experts, shares in zip(EXPERTS, dataset["routing"]["expert_share"], strict=True):
            if experts == 1:
                assert set(shares) == {None}
            else:
                assert sum(shares) == pytest.approx(2) and sum(shares[experts:]) == 0
    report = load_tool("report")
    page = tmp_path / "report.html"
    monkeypatch.setattr("sys.argv", ["report.py", "--evaluation", f"unequal={output}", "--output", str(page)])
    report.main()
    assert page.stat().st_size > 1000
