"""--deterministic-mode on the device: the same losses up to rounding, the same bits after a resume."""

import contextlib
import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megatron_moe_lpr.platform.determinism import VARIABLES
from tests.gpu.ranks import run
from tests.gpu.test_numerics import BF16
from tests.training.runs import metrics, rewind, train

FIELDS = {"platform": "cuda", "fp32": False, **BF16, "seq_length": 64, "micro_batch_size": 4, "global_batch_size": 8}
STEPS = {"train_iters": 4, "save_interval": 2}


@contextlib.contextmanager
def restored():
    """Afterwards the process, which serves other tests, computes as before."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    try:
        with patch.dict(os.environ):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills


def train_once(checkpoint: Path, save: Path, data: dict, on: bool) -> tuple[bool, dict[str, str | None]]:
    """On every rank: train; whether torch then used deterministic algorithms, and the variables."""
    with restored():
        for name in VARIABLES:
            os.environ.pop(name, None)
        train(checkpoint, save, data, **FIELDS, **STEPS, deterministic_mode=on)
        return torch.are_deterministic_algorithms_enabled(), {name: os.environ.get(name) for name in VARIABLES}


def test_it_changes_rounding_alone_and_resumes_to_the_bit(inputs, tmp_path):
    found = {on: run(1, train_once, inputs[0], tmp_path / str(on), inputs[1], on)[0] for on in (False, True)}
    assert found[False] == (False, dict.fromkeys(VARIABLES))
    assert found[True] == (True, {name: values[0] for name, values in VARIABLES.items()})
    usual, steady = metrics(tmp_path / "False"), metrics(tmp_path / "True")
    for step in usual:
        assert steady[step]["lm_loss"] == pytest.approx(usual[step]["lm_loss"], rel=1e-2)
    resumed = rewind(tmp_path / "True", tmp_path / "resumed", 2)
    run(1, train_once, inputs[0], resumed, inputs[1], True)
    losses = {step: record["lm_loss"] for step, record in metrics(resumed).items()}
    assert losses == {step: steady[step]["lm_loss"] for step in (3, 4)}
