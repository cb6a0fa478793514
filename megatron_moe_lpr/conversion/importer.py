"""Hugging Face -> Megatron: a dense model, upcycled or not, an adapter over its base, or an exported MoE."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard, tool_versions
from megatron_moe_lpr.checkpoint.format.directory import (
    CARD_FILE,
    CONFIG_FILE,
    LATEST_FILE,
    RELEASE,
    SIDE_DIRECTORY,
    write_latest,
)
from megatron_moe_lpr.checkpoint.format.writer import CheckpointWriter
from megatron_moe_lpr.checkpoint.loading.verification import warn
from megatron_moe_lpr.conversion.hugging_face.base_model import BASE_MODEL_FILE, base_model_of
from megatron_moe_lpr.conversion.hugging_face.hf_directory import carried_files, carry_files, tokenizer_files
from megatron_moe_lpr.conversion.hugging_face.tokenizer_check import check_tokenizer
from megatron_moe_lpr.conversion.plan import ImportOptions, ImportPlan, plan_import
from megatron_moe_lpr.conversion.side_files import check_disk_space, check_separate, write_json
from megatron_moe_lpr.conversion.tensors.blocks import ZEROED, grown_config
from megatron_moe_lpr.conversion.tensors.fingerprint import OriginalFingerprint
from megatron_moe_lpr.conversion.tensors.upcycling import initial_router, interleave_qkv
from megatron_moe_lpr.data.language_groups import IMPORTED_ADAPTER, IMPORTED_MIXTURE
from megatron_moe_lpr.errors import UserError, naming
from megatron_moe_lpr.files.checksums import write_manifest
from megatron_moe_lpr.files.links import copy_private
from megatron_moe_lpr.files.output_directory import atomic_directory
from megatron_moe_lpr.model.finite import is_finite
from megatron_moe_lpr.model.tensors import Role, Row
from megatron_moe_lpr.progress import ProgressReport


def import_hf(options: ImportOptions, save: Path, overwrite: bool = False) -> CheckpointCard:
    """Write the Megatron checkpoint `save` from a Hugging Face directory and return its card.

    Raises:
        UserError: something in the source, or what was asked for, does not fit; nothing is left at `save`.
        OSError: the disk is full; nothing is left at `save`.
    """
    _check_separate(options, save)
    plan = plan_import(options)
    _check_extra_tensors(plan)
    family, is_moe = plan.model.architecture.family, max(plan.experts_per_layer) > 1
    for line in check_tokenizer(plan.model.path, family.moe_model_type if is_moe else family.name):
        warn(line)
    files, tokenizer = carried_files(plan.model.path), tokenizer_files(plan.model.path)
    config, base_model = _changed_config(plan), base_model_of(plan.model.path, exported=plan.model.card is not None)
    total = sum(math.prod(row.shape) * plan.dtype_of(row).itemsize for row in plan.rows)
    with naming(save), atomic_directory(save, overwrite, (LATEST_FILE,)) as partial:
        check_disk_space(partial, total, save)
        iteration = partial / RELEASE
        with CheckpointWriter(iteration, {"iteration": 0}) as writer, ProgressReport("importing", total) as progress:
            fingerprint = _write_tensors(plan, writer, progress)
        card = _card(plan, fingerprint, tokenizer)
        _write_side_files(plan, card, files, config, iteration / SIDE_DIRECTORY)
        write_json(base_model.as_json(), iteration / SIDE_DIRECTORY / BASE_MODEL_FILE)
        write_manifest(iteration, writer.checksums)
        write_latest(partial, None)
    return card


def _check_separate(options: ImportOptions, save: Path) -> None:
    check_separate(options.hf, "--hf", save, "--save")
    if options.adapter:
        check_separate(options.adapter, "--adapter", save, "--save")
    if options.experts_per_layer and Path(options.experts_per_layer).is_file():
        check_separate(Path(options.experts_per_layer), "--experts-per-layer", save, "--save")


def _write_tensors(plan: ImportPlan, writer: CheckpointWriter, progress: ProgressReport) -> str:
    fingerprint = OriginalFingerprint()
    # Hashing beside writing costs no time where a second core is free.
    with ThreadPoolExecutor(1) as pool:
        for _, group in itertools.groupby(plan.rows, key=lambda row: row.names or row.key):
            rows = list(group)
            parts = [_read_finite(plan, name).to(plan.dtype_of(rows[0])) for name in rows[0].names]
            hashing = [pool.submit(fingerprint.add, *pair) for pair in zip(rows[0].dense_names, parts, strict=False)]
            tensor = _tensor(plan, rows[0], parts)
            for row in rows:
                writer.write(row.key, tensor)
                progress.advance(tensor.nbytes, {"MB": tensor.nbytes / 1e6})
            for future in hashing:
                future.result()
    _check_complete(plan, writer)
    return fingerprint.hexdigest()


def _read_finite(plan: ImportPlan, name: str) -> torch.Tensor:
    tensor = plan.source.read(name)
    if not is_finite(tensor):
        raise UserError(
            f"{plan.source.file_of(name)}: {name} holds NaN or infinite values; copy the file again, "
            "or use a model without them"
        )
    return tensor


def _tensor(plan: ImportPlan, row: Row, parts: list[torch.Tensor]) -> torch.Tensor:
    if plan.inserts and row.role is Role.INSERTED_BLOCK and row.key.endswith(ZEROED):
        return torch.zeros_like(parts[0])
    if row.role is Role.ROUTER and row.layer is not None and not parts:
        num_experts, hidden_size = row.shape
        return initial_router(num_experts, hidden_size, plan.seed, row.layer)
    if len(parts) > 1:
        return interleave_qkv(parts, plan.model.architecture)
    return parts[0]


def _check_extra_tensors(plan: ImportPlan) -> None:
    for extra in plan.model.extra():
        tensor = plan.source.read(extra.name)
        if extra.copy_of is not None:
            fits, wanted = torch.equal(tensor, plan.source.read(extra.copy_of)), f"is not equal to {extra.copy_of}"
        else:
            fits, wanted = not torch.count_nonzero(tensor), "is not zero"
        if not fits:
            raise UserError(f"{plan.source.file_of(extra.name)}: {extra.name} {wanted}; {extra.otherwise}")


def _check_complete(plan: ImportPlan, writer: CheckpointWriter) -> None:
    missing = {row.key for row in plan.rows} ^ set(writer.tensors)
    if missing:
        raise UserError(f"{writer.directory}: not written as planned: {', '.join(sorted(missing)[:3])}")


def _card(plan: ImportPlan, fingerprint: str, tokenizer: dict[str, str]) -> CheckpointCard:
    before = plan.model.card
    return CheckpointCard(
        family=plan.model.architecture.family.name,
        experts_per_layer=plan.experts_per_layer,
        top_k=plan.top_k,
        dtype=str(plan.dtype).removeprefix("torch."),
        original_fingerprint=fingerprint,
        router_seed=plan.seed if plan.initialises_routers else before.router_seed if before else None,
        tokenizer_files=tokenizer,
        tool_versions=tool_versions(),
        history=_history(plan),
        expansions=before.expansions if before and plan.model.is_moe else [],
        inserted_blocks=plan.inserted_blocks,
    )


def _history(plan: ImportPlan) -> list[dict]:
    """What the source knows about its training, then what the user says about experts that were trained elsewhere."""
    history = plan.model.card.history if plan.model.card else []
    said = plan.languages.history_fields() if plan.languages else {}
    if plan.adapter:
        return [*history, {"stage": IMPORTED_ADAPTER, "source": plan.adapter.path.name, **said}]
    return [*history, {"stage": IMPORTED_MIXTURE, "source": plan.model.path.name, **said}] if said else history


def _changed_config(plan: ImportPlan) -> dict[str, Any] | None:
    """The dense model's configuration where it is not the source's own file."""
    if plan.inserts:
        return grown_config(plan.model.config, len(plan.experts_per_layer), plan.inserted_blocks)
    return plan.model.config if plan.model.is_moe else None


def _write_side_files(
    plan: ImportPlan, card: CheckpointCard, files: dict[str, Path], config: dict[str, Any] | None, directory: Path
) -> None:
    directory.mkdir()
    carry_files(files, directory)
    if config is None:
        copy_private(plan.model.path / CONFIG_FILE, directory / CONFIG_FILE)
    else:
        write_json(config, directory / CONFIG_FILE)
    card.write(directory / CARD_FILE)
