"""A step over samples of several documents, kept apart or each computed alone, at any layout."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_moe_lpr.checkpoint.loading.model import load_model
from megatron_moe_lpr.data.reading.batches import collate
from megatron_moe_lpr.data.reading.document_options import DocumentOptions
from megatron_moe_lpr.data.reading.documents import document_keys
from megatron_moe_lpr.engine.micro_batches import run_schedule, to_device
from megatron_moe_lpr.engine.optimizer import build_optimizer, wrap_data_parallel
from megatron_moe_lpr.engine.options import OptimizerOptions
from megatron_moe_lpr.engine.routing import collect_routing, reset_routing
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.forward import compute_logits
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from megatron_moe_lpr.training.configuration.stages import StageOptions, freeze
from tests.conversion.helpers import change_config, perturb, rewrite_checkpoint, run
from tests.conversion.tiny_models import COMMON, save_model
from tests.training.one_step import (
    LANGUAGE_GROUP,
    SAMPLES,
    SEQUENCE,
    VOCABULARY,
    gather_gradients,
    parallel_state,
    samples,
)

STARTS = ([5, 18], [], [1, 2, 20], [16], [7, 14, 21], [9, 27], [31], [3, 30])
"""Where documents begin in each sample of `one_step.samples`, besides at 0; two samples end in padding."""
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


@dataclasses.dataclass(frozen=True)
class DocumentCase:
    """How to compute the step."""

    layout: dict = dataclasses.field(default_factory=dict)
    compute: dict = dataclasses.field(default_factory=dict)
    stage: str = "full"
    alone: bool = False
    """Each document by itself, as a sample of its own length, in one process."""
    leak: str = ""
    """mask: the documents see each other; boundary: each begins one token later."""
    positions: str = "document"
    """Counted in each document, in the sample, or `halved`: half as far apart."""
    platform: str = "cpu"


def documents_checkpoint(
    root: Path, change: Callable[[dict[str, torch.Tensor]], None] = perturb, **sizes: object
) -> Path:
    """Four layers of five different experts; Mistral has a sliding window of 8 and here yarn's rotary frequencies."""
    before = dict(COMMON)
    COMMON.update(sizes, num_hidden_layers=4)
    save_model("mistral", root / "hf")
    COMMON.clear()
    COMMON.update(before)
    change_config(root / "hf", rope_parameters=YARN)
    run("import", "--hf", root / "hf", "--save", root / "moe", "--num-experts", 5)
    rewrite_checkpoint(root / "moe", change)
    return root / "moe"


def document_batch(case: DocumentCase) -> dict[str, torch.Tensor]:
    """The global batch with the keys of documents that are kept apart."""
    options = DocumentOptions(True, reset_position_ids=case.positions == "document")
    keys = [document_keys(starts, SEQUENCE, options) for starts in STARTS]
    whole = samples()
    batch = collate([{key: tensor[index] for key, tensor in whole.items()} | keys[index] for index in range(SAMPLES)])
    if case.positions == "halved":
        batch["position_ids"] = batch["position_ids"] // 2
    return batch


def spans() -> list[tuple[int, slice]]:
    """Sample and place of each document that is no padding."""
    found = [
        (index, slice(start, end))
        for index, starts in enumerate(STARTS)
        for start, end in zip([0, *starts], [*starts, SEQUENCE], strict=True)
    ]
    language = samples()["language"]
    return [(index, span) for index, span in found if language[index, span.start] >= 0]


def micro_batches(case: DocumentCase) -> list[dict[str, torch.Tensor]]:
    """This data-parallel rank's micro-batches: of two samples, or of one document alone."""
    if case.alone:
        return [{key: tensor[index, None, span] for key, tensor in samples().items()} for index, span in spans()]
    whole = document_batch(case)
    del whole["cu_seqlens"]
    rows = [{key: tensor[index] for key, tensor in whole.items()} for index in range(SAMPLES)]
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = [collate(rows[index : index + 2]) for index in range(0, SAMPLES, 2)]
    for batch in batches:
        if case.leak == "mask":
            del batch["cu_seqlens"]
        elif case.leak == "boundary":
            batch["cu_seqlens"][1:-1] += 1
            batch["cu_seqlens"] = batch["cu_seqlens"].unique().int()
    return batches[rank::ranks]


def run_documents(path: Path, case: DocumentCase) -> dict:
    """On every rank of a pool: logits of each document, summed loss, LPR loss, and whole gradients."""
    layout = ParallelLayout(**case.layout)
    platform = select_platform(case.platform, layout.tensor_model_parallel_size)
    initialize_parallel(platform, layout)
    # The load balancing loss is one of a micro-batch: it depends on which documents share one.
    coefficients = {"load_balancing_coeff": 0.0, "lpr_loss_coeff": 0.5, "calculate_per_token_loss": True}
    model = load_model(path, layout, platform, ComputeOptions(**case.compute), **coefficients)
    batches = [to_device(batch, platform.device) for batch in micro_batches(case)]
    with torch.no_grad():
        logits = [
            compute_logits(
                model.chunks,
                model.config,
                batch["tokens"],
                VOCABULARY,
                cu_seqlens=batch.get("cu_seqlens"),
                position_ids=batch["position_ids"],
            ).cpu()
            for batch in batches
        ]
    freeze(model.chunks, StageOptions(stage=case.stage).resolve(), extensions=0)
    options = OptimizerOptions()
    chunks = wrap_data_parallel(model.chunks, model.config, options)
    optimizer = build_optimizer(chunks, model.config, options, platform)
    reset_routing(chunks)
    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    sums = run_schedule(chunks, model.config, batches, LANGUAGE_GROUP.to(platform.device))
    routing = collect_routing(chunks, model.shape)
    optimizer.prepare_grads()
    return {
        "logits": logits,
        "rank": parallel_state.get_data_parallel_rank(),
        "loss": sums.mean,
        "lpr": routing.mean_over_layers(routing.lpr_loss, "original"),
        "gradients": {key: gradient.float().cpu() for key, gradient in gather_gradients(chunks).items()},
    }


def by_document(results: list[dict]) -> list[torch.Tensor]:
    """Logits of each document, [tokens, vocabulary], from the samples of all data-parallel ranks."""
    ranks = {result["rank"]: result["logits"] for result in results}
    batches = [ranks[number % len(ranks)][number // len(ranks)] for number in range(SAMPLES // 2)]
    whole = torch.cat(batches)
    return [whole[index, span] for index, span in spans()]


def errors(results: list[dict], alone: dict) -> dict[str, float]:
    """Relative differences to every document alone: of logits, of gradients, of losses."""
    result, documents = results[0], list(zip(by_document(results), (one[0] for one in alone["logits"]), strict=True))
    assert result["gradients"].keys() == alone["gradients"].keys()
    gradients = [(result["gradients"][key], gradient) for key, gradient in alone["gradients"].items()]
    return {
        "logits": relative(documents),
        "worst document": max(relative([pair]) for pair in documents),
        "gradients": relative(gradients),
        "worst parameter": max(relative([pair]) for pair in gradients),
        **{name: abs(result[name] - alone[name]) / abs(alone[name]) for name in ("loss", "lpr")},
    }


def relative(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Norm of the differences of the tensors, found and expected, over the norm of what is expected."""
    found, expected = (torch.cat([pair[which].flatten() for pair in pairs]).double() for which in range(2))
    return ((found - expected).norm() / expected.norm()).item()
