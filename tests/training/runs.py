"""Whole training runs for tests: a tiny checkpoint, token datasets, and the metrics a run wrote."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_moe_lpr.checkpoint.format.directory import write_latest
from megatron_moe_lpr.data.reading.config import DataConfig
from megatron_moe_lpr.data.reading.document_options import DocumentOptions
from megatron_moe_lpr.engine.options import BatchOptions, OptimizerOptions
from megatron_moe_lpr.engine.state_options import OptimizerStateOptions
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.fp8 import FP8Options
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import PlatformName
from megatron_moe_lpr.pretrain import pretrain
from megatron_moe_lpr.training.configuration.config import (
    CheckpointOptions,
    GuardOptions,
    LoggingOptions,
    TrainingConfig,
)
from megatron_moe_lpr.training.configuration.stages import StageOptions
from tests.conversion.helpers import change_hf, perturb, rewrite_checkpoint, run
from tests.conversion.tiny_models import COMMON, save_model
from tests.data.builders import write_dataset

LANGUAGES = ("el", "en", "hu")
ORIGINAL = ["en"]


def make_checkpoint(
    root: Path,
    model: str = "qwen2-tied",
    experts: int = 5,
    perturbed: bool = True,
    change: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> Path:
    """A converted tiny model of four layers, without a tokenizer; with `perturbed` its experts differ.

    Args:
        change: of the dense model's float32 tensors, before they are converted.
    """
    layers, COMMON["num_hidden_layers"] = COMMON["num_hidden_layers"], 4
    save_model(model, root / "hf")
    COMMON["num_hidden_layers"] = layers
    for file in (root / "hf").glob("tokenizer*"):
        file.unlink()
    if change:
        change_hf(root / "hf", change)
    run("import", "--hf", root / "hf", "--save", root / "checkpoint", "--num-experts", experts)
    if perturbed and experts > 1:
        rewrite_checkpoint(root / "checkpoint", perturb)
    return root / "checkpoint"


def make_data(root: Path) -> dict[str, str]:
    """A dataset per language: 30 tokens of its own each, in a pattern that a model can learn."""
    generator = np.random.default_rng(3)
    prefixes = {}
    for index, language in enumerate(LANGUAGES):
        start = generator.integers(0, 30, size=60)
        documents = [[int((first + step * 7) % 30) + 30 * index + 1 for step in range(80)] for first in start]
        prefixes[language] = write_dataset(root / language, language, documents)
    return prefixes


def training_config(
    load: Path, save: Path, data: dict[str, str], stage: str = "1", platform: PlatformName = "cpu", **changes
) -> TrainingConfig:
    """A short run. `changes` go to the dataclass that has the field."""
    languages = {"1": ("el", "hu"), "2": LANGUAGES, "full": LANGUAGES, "sft": LANGUAGES, "blocks": ("el", "hu")}[stage]
    fields = {
        "train_iters": 6,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "seq_length": 32,
        "lr": 1e-2,
        "log_interval": 1,
        "data_path": [data[language] for language in languages],
        "original_languages": ORIGINAL,
        "num_workers": 0,
        "fp32": True,
        "load": load,
        "save": save,
    } | changes

    def part(kind: type, **given):
        names = kind.__dataclass_fields__.keys() - given.keys()
        return kind(**given, **{name: fields[name] for name in names if name in fields})

    return TrainingConfig(
        stage=part(StageOptions, stage=stage),
        checkpoint=part(CheckpointOptions),
        batch=part(BatchOptions),
        data=part(DataConfig, documents=part(DocumentOptions)),
        optimizer=part(OptimizerOptions, states=part(OptimizerStateOptions)),
        compute=part(ComputeOptions, fp8=part(FP8Options)),
        layout=part(ParallelLayout),
        logging=part(LoggingOptions),
        guards=part(GuardOptions),
        platform=platform,
    )


def train(*arguments, **changes) -> bool:
    """On every rank of a pool: run to the end."""
    return pretrain(training_config(*arguments, **changes))


def metrics(save: Path, kind: str = "train") -> dict[int, dict]:
    """Records of one kind by iteration; the last written one of each."""
    lines = (json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines())
    return {line["iteration"]: line for line in lines if line["kind"] == kind}


def rewind(source: Path, target: Path, iteration: int) -> Path:
    """A copy of a run as it was after `iteration`, with no metrics yet."""
    name = f"iter_{iteration:07d}"
    shutil.copytree(source / name, target / name)
    write_latest(target, iteration)
    return target
