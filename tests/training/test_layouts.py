"""The same step in every parallel layout as in one process: losses and all gradients, fp32."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

from megatron_moe_lpr.model.configuration.parameter_kinds import kind_of
from tests.conversion.helpers import perturb, rewrite_checkpoint, run
from tests.conversion.tiny_models import COMMON, save_model
from tests.distributed import rank_pool
from tests.training.one_step import StepCase, StepResult, run_step

TOLERANCE = 1e-4

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "moe", "layernorm")}
MOE_ACT = {"recompute_granularity": "selective", "recompute_modules": ("moe_act",)}
TP2 = {"tensor_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
VPP = PP2 | {"num_virtual_stages_per_pipeline_rank": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAPPED = DISTRIBUTED | {"overlap_grad_reduce": True}

CASES: dict[str, tuple[int, StepCase]] = {
    "recompute full": (1, StepCase(recompute=FULL)),
    "recompute selective": (1, StepCase(recompute=SELECTIVE)),
    "recompute moe_act": (1, StepCase(recompute=MOE_ACT)),
    "distributed optimizer": (1, StepCase(optimizer=DISTRIBUTED)),
    "TP2+SP": (2, StepCase(TP2)),
    "TP2+SP, recompute full": (2, StepCase(TP2, recompute=FULL)),
    "TP2+SP, recompute selective": (2, StepCase(TP2, recompute=SELECTIVE)),
    "TP2+SP, expert TP2": (2, StepCase(TP2 | {"expert_tensor_parallel_size": 2})),
    "TP2+SP, distributed optimizer": (2, StepCase(TP2, optimizer=DISTRIBUTED)),
    "EP2": (2, StepCase(EP2)),
    "EP2, recompute full": (2, StepCase(EP2, recompute=FULL)),
    "EP2, recompute selective": (2, StepCase(EP2, recompute=SELECTIVE)),
    "EP2, distributed optimizer": (2, StepCase(EP2, optimizer=DISTRIBUTED)),
    "EP2, all-gather dispatcher": (2, StepCase(EP2, dispatcher="allgather")),
    "PP2": (2, StepCase(PP2)),
    "PP2, recompute full": (2, StepCase(PP2, recompute=FULL)),
    "PP2 interleaved": (2, StepCase(VPP)),
    "PP2 interleaved, recompute selective": (2, StepCase(VPP, recompute=SELECTIVE)),
    "CP2": (2, StepCase(CP2)),
    "CP2xEP2, distributed optimizer": (2, StepCase(CP2 | EP2, optimizer=DISTRIBUTED)),
    "CP2xTP2+SP, recompute full": (4, StepCase(CP2 | TP2, recompute=FULL)),
    "CP2xDP2xEP2, recompute selective": (4, StepCase(CP2 | EP2, recompute=SELECTIVE)),
    "CP4": (4, StepCase(CP2 | {"context_parallel_size": 4})),
    "CP2xPP2 interleaved": (4, StepCase(CP2 | VPP)),
    "stage 2, CP2xTP2xEP2": (4, StepCase(CP2 | TP2 | EP2, stage="2")),
    "full training, CP2xEP2": (2, StepCase(CP2 | EP2, stage="full")),
    "DP2": (2, StepCase()),
    "DP2, overlapped reduction": (2, StepCase(optimizer=OVERLAPPED)),
    "DP2, distributed optimizer": (2, StepCase(optimizer=DISTRIBUTED)),
    "TP2xEP2": (2, StepCase(TP2 | EP2)),
    "TP2xEP2, recompute full": (2, StepCase(TP2 | EP2, recompute=FULL)),
    "TP2xEP2xDP2": (4, StepCase(TP2 | EP2)),
    "EP2xPP2": (4, StepCase(EP2 | PP2)),
    "EP2xPP2, recompute full, distributed optimizer": (
        4,
        StepCase(EP2 | PP2, recompute=FULL, optimizer=DISTRIBUTED),
    ),
    "embeddings too, TP2+SP": (2, StepCase(TP2, train_embeddings=True)),
    "embeddings too, PP2": (2, StepCase(PP2, train_embeddings=True)),
    "full training, TP2xEP2": (2, StepCase(TP2 | EP2, stage="full")),
    "full training, EP2xPP2": (4, StepCase(EP2 | PP2, stage="full")),
    "stage 2, TP2xEP2": (2, StepCase(TP2 | EP2, stage="2")),
    "stage 2, PP2 interleaved": (2, StepCase(VPP, stage="2")),
}

ROWS: list[tuple] = []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small tied Qwen2 with 5 different experts a layer and routers that spread the tokens."""
    root = tmp_path_factory.mktemp("layouts")
    layers, COMMON["num_hidden_layers"] = COMMON["num_hidden_layers"], 4
    save_model("qwen2-tied", root / "hf")
    COMMON["num_hidden_layers"] = layers
    run("import", "--hf", root / "hf", "--save", root / "moe", "--num-experts", 5)
    rewrite_checkpoint(root / "moe", perturb)
    return root / "moe"


@pytest.fixture(scope="module")
def references(checkpoint):
    """One process's results, by what trains."""
    known: dict[tuple[str, bool], StepResult] = {}

    def get(stage: str, train_embeddings: bool = False) -> StepResult:
        case = (stage, train_embeddings)
        if case not in known:
            known[case] = rank_pool(1).run(run_step, checkpoint, StepCase({}, *case))[0]
        return known[case]

    return get


@pytest.fixture(scope="module", autouse=True)
def _print_table():
    yield
    table = Table("layout", "loss", "LPR", "balance", "router grad", "new expert grad", "largest relative difference")
    for row in ROWS:
        table.add_row(*row)
    Console(width=150).print(table)


def relative(value: float, reference: float) -> float:
    return abs(value - reference) / max(abs(reference), 1e-12)


def differences(result: StepResult, reference: StepResult) -> dict[str, float]:
    """Relative differences: of numbers to themselves, of a gradient tensor to its own norm."""
    assert result.gradients.keys() == reference.gradients.keys()
    found = {
        name: relative(getattr(result, name), getattr(reference, name)) for name in ("loss", "lpr", "load_balancing")
    }
    whole = torch.cat([gradient.flatten() for gradient in reference.gradients.values()])
    found["gradient norm"] = relative(result.grad_norm, whole.double().norm().item())
    for key, gradient in reference.gradients.items():
        found[key] = ((result.gradients[key] - gradient).norm() / gradient.norm()).item()
    return found


def record(name: str, result: StepResult, worst: float | None = None) -> None:
    kinds = {kind_of(key) for key in result.gradients}
    norms = [f"{result.norm(kind):.6g}" if kind in kinds else "-" for kind in ("router", "new experts")]
    numbers = (f"{result.loss:.6f}", f"{result.lpr:.6f}", f"{result.load_balancing:.6f}")
    ROWS.append((name, *numbers, *norms, "reference" if worst is None else f"{worst:.1e}"))


def test_reference_has_every_gradient(references):
    """Of 4 layers: a router each, and three matrices of each of 4 new experts."""
    result = references("1")
    record("one process", result)
    assert sum(".router." in key for key in result.gradients) == 4
    assert sum(".experts." in key for key in result.gradients) == 4 * 4 * 3
    assert len(result.gradients) == 4 + 4 * 4 * 3


@pytest.mark.parametrize("name", CASES)
def test_layout_equals_one_process(name, checkpoint, references):
    world, case = CASES[name]
    reference = references(case.stage, case.train_embeddings)
    for result in rank_pool(world).run(run_step, checkpoint, case):
        found = differences(result, reference)
        worst = max(found, key=found.get)
        assert found[worst] < TOLERANCE, f"{worst}: {found[worst]:.2e}"
    record(name, result, found[worst])


@pytest.mark.parametrize("size", [1, 4, 8])
def test_number_of_micro_batches_does_not_matter(size, checkpoint):
    """Of the LM and LPR losses; load balancing is defined on a micro-batch."""
    whole, parts = (
        rank_pool(1).run(run_step, checkpoint, StepCase(micro_batch_size=each, load_balancing_coeff=0.0))[0]
        for each in (2, size)
    )
    found = differences(parts, whole)
    found.pop("load_balancing")
    record(f"{8 // size} micro-batches (no load balancing)", parts, max(found.values()))
    assert max(found.values()) < TOLERANCE
    assert torch.isfinite(torch.tensor(list(found.values()))).all()
