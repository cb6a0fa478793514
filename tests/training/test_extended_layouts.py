"""An extended vocabulary in every parallel layout: the same step as in one process and as with one matrix."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.checkpoint.format.directory import CARD_FILE, resolve_checkpoint
from tests.conversion.helpers import rewrite_checkpoint
from tests.distributed import rank_pool
from tests.training.new_rows import extend_checkpoint
from tests.training.one_step import StepCase, StepResult, run_step
from tests.training.runs import make_checkpoint
from tests.training.test_layouts import DISTRIBUTED, EP2, FULL, OVERLAPPED, PP2, TP2, VPP, differences

TOLERANCE = 1e-4
BASE, NEW_TOKENS = 99, (13, 21)
"""Neither is a multiple of what it is padded to, and the rows of the first extension are frozen."""
MODELS = {"tied": "qwen2-tied", "untied": "llama"}
EMBEDDING = ("embedding.word_embeddings", "embedding.new_word_embeddings.0", "embedding.new_word_embeddings.1")
OUTPUT = ("output_layer", "output_layer.new_rows.0", "output_layer.new_rows.1")

CASES = {
    "TP2+SP": (2, StepCase(TP2)),
    "TP2+SP, recompute full, distributed optimizer": (2, StepCase(TP2, recompute=FULL, optimizer=DISTRIBUTED)),
    "PP2": (2, StepCase(PP2)),
    "PP2 interleaved, distributed optimizer": (2, StepCase(VPP, optimizer=DISTRIBUTED)),
    "EP2": (2, StepCase(EP2)),
    "DP2, overlapped reduction": (2, StepCase(optimizer=OVERLAPPED)),
    "TP2xEP2": (2, StepCase(TP2 | EP2)),
    "TP2xPP2": (4, StepCase(TP2 | PP2)),
    "PP2xDP2, distributed optimizer": (4, StepCase(PP2, optimizer=DISTRIBUTED)),
    "EP2xPP2, recompute full, distributed optimizer": (4, StepCase(EP2 | PP2, recompute=FULL, optimizer=DISTRIBUTED)),
    "stage 2, TP2xPP2": (4, StepCase(TP2 | PP2, stage="2")),
    "stage 2, new-token loss, TP2+SP": (2, StepCase(TP2, stage="2", new_token_loss_coeff=2.0)),
    "stage 2, new-token loss, PP2xDP2, recompute full, distributed optimizer": (
        4,
        StepCase(PP2, "2", recompute=FULL, optimizer=DISTRIBUTED, new_token_loss_coeff=2.0),
    ),
    "stage 2 without new rows, TP2": (2, StepCase(TP2, stage="2", train_new_rows=False)),
    "full training, TP2xPP2": (4, StepCase(TP2 | PP2, stage="full")),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for name, model in MODELS.items():
        found[name] = make_checkpoint(tmp_path_factory.mktemp(name), model)
        extend_checkpoint(found[name], NEW_TOKENS)
    return found


@pytest.fixture(scope="module")
def references(checkpoints):
    """One process's results, by model and by what trains."""
    known: dict[tuple[str, StepCase], StepResult] = {}

    def get(model: str, case: StepCase) -> StepResult:
        chosen = {"train_new_rows": case.train_new_rows, "new_token_loss_coeff": case.new_token_loss_coeff}
        alone = StepCase({}, case.stage, **chosen)
        if (key := (model, str(alone))) not in known:
            known[key] = rank_pool(1).run(run_step, checkpoints[model], alone)[0]
        return known[key]

    return get


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CASES)
def test_layout_equals_one_process(name, model, checkpoints, references):
    world, case = CASES[name]
    reference = references(model, case)
    for result in rank_pool(world).run(run_step, checkpoints[model], case):
        found = differences(result, reference)
        worst = max(found, key=found.get)
        assert found[worst] < TOLERANCE, f"{worst}: {found[worst]:.2e}"


@pytest.mark.parametrize("model", MODELS)
def test_only_rows_of_the_latest_extension_get_a_gradient(model, references):
    """In stages 1 and 2; in stage 2 none with --no-train-new-rows; in full training all."""
    outer = {
        name: {key for key in references(model, case).gradients if ".layers." not in key}
        for name, case in {
            "1": StepCase(),
            "2": StepCase(stage="2"),
            "2, no new rows": StepCase(stage="2", train_new_rows=False),
            "full": StepCase(stage="full"),
        }.items()
    }
    matrices = (EMBEDDING, OUTPUT) if model == "untied" else (EMBEDDING,)
    assert outer["1"] == outer["2"] == {f"{rows[2]}.weight" for rows in matrices}
    assert outer["2, no new rows"] == set()
    everything = {f"{part}.weight" for rows in matrices for part in rows}
    assert outer["full"] == everything | {"decoder.final_layernorm.weight"}


def joined(path: Path, target: Path) -> Path:
    """The same model with one matrix over all tokens, as a checkpoint without extensions."""
    shutil.copytree(path, target)
    directory = resolve_checkpoint(target)
    dataclasses.replace(directory.card(), new_tokens=[]).write(directory.side_directory / CARD_FILE)
    config = directory.side_directory / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"vocab_size": fields["vocab_size"] + sum(NEW_TOKENS)}))

    def join(tensors: dict[str, torch.Tensor]) -> None:
        for rows in (EMBEDDING, OUTPUT):
            if f"{rows[1]}.weight" in tensors:
                parts = [tensors[f"{rows[0]}.weight"], *(tensors.pop(f"{part}.weight") for part in rows[1:])]
                tensors[f"{rows[0]}.weight"] = torch.cat(parts)

    rewrite_checkpoint(target, join)
    return target


@pytest.mark.parametrize("model", MODELS)
def test_a_step_equals_that_of_one_matrix(model, checkpoints, references, tmp_path):
    """Megatron's own embedding, output layer and loss over the whole vocabulary are the reference."""
    path = joined(checkpoints[model], tmp_path / "joined")
    whole = rank_pool(1).run(run_step, path, StepCase(stage="full"))[0]
    parts = references(model, StepCase(stage="full"))
    gradients = dict(whole.gradients)
    for rows in (EMBEDDING, OUTPUT)[: 2 if model == "untied" else 1]:
        split = gradients.pop(f"{rows[0]}.weight").split((BASE, *NEW_TOKENS))
        gradients |= {f"{part}.weight": rows for part, rows in zip(rows, split, strict=True)}
    found = differences(dataclasses.replace(whole, gradients=gradients), parts)
    assert max(found.values()) < 1e-5, found
