"""A run that one version of megatron-core has saved goes on under the other, at the same layout."""

import functools
import json
import os
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tests.conversion.helpers import checkpoint_tensors
from tests.distributed import free_port
from tests.training.runs import make_checkpoint, make_data, metrics, rewind

pytestmark = pytest.mark.skipif(
    metadata.version("megatron-core").startswith("0.16"),
    reason="make test-next runs these, beside the .venv of make test",
)
ROOT = Path(__file__).parents[2]
ENVIRONMENTS = {"0.16": ROOT / ".venv", "0.19": ROOT / ".venv-next"}
VERSION = "from importlib.metadata import version; print(version('megatron-core'))"
SAVED, LAST = 3, 6
OPTIONS = {"use_distributed_optimizer": True, "fp32": False, "bf16": True}
RANKS = 2
LOSSES_APART = 1e-4
"""Measured: none, to the bit. The versions of torch differ too, 2.13 and 2.14, whose kernels may round otherwise."""


@functools.cache
def python(version: str) -> Path:
    """The Python of the environment with that megatron-core; the test is skipped where there is none."""
    path = ENVIRONMENTS[version] / "bin" / "python"
    if not path.exists():
        pytest.skip(f"no environment {ENVIRONMENTS[version].name}: make install, or make test-next, makes it")
    found = subprocess.run([path, "-c", VERSION], capture_output=True, text=True, timeout=60).stdout
    if not found.startswith(version):
        pytest.skip(f"{ENVIRONMENTS[version].name} has megatron-core {found.strip() or 'not installed'}")
    return path


def go(version: str, load: Path, save: Path, data: dict[str, str]) -> None:
    """Train to the last step on two expert-parallel ranks, in that environment."""
    changes = OPTIONS | {"train_iters": LAST, "save_interval": SAVED, "expert_model_parallel_size": RANKS}
    given = json.dumps({"load": str(load), "save": str(save), "data": data, "changes": changes})
    common = os.environ | {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [python(version), "-m", "tests.next.run_steps", given],
            cwd=ROOT,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    output = [process.communicate(timeout=600)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(output)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """By version a run without a break, with the same checkpoint and data."""
    for version in ENVIRONMENTS:
        python(version)
    root = tmp_path_factory.mktemp("versions")
    load, data = make_checkpoint(root), make_data(root)
    for version in ENVIRONMENTS:
        go(version, load, root / version, data)
    return root, load, data


@pytest.mark.parametrize(("saved", "resumed"), [("0.16", "0.19"), ("0.19", "0.16")])
def test_a_run_goes_on_under_the_other_version(saved, resumed, whole, tmp_path):
    root, load, data = whole
    save = rewind(root / saved, tmp_path / "run", SAVED)
    go(resumed, load, save, data)
    expected, found = metrics(root / saved), metrics(save)
    assert sorted(found) == list(range(SAVED + 1, LAST + 1))
    apart = max(abs(found[step]["lm_loss"] / expected[step]["lm_loss"] - 1) for step in found)
    before, after = checkpoint_tensors(root / saved), checkpoint_tensors(save)
    equal = sum(torch.equal(tensor, after[key]) for key, tensor in before.items())
    print(
        f"saved under {saved}, resumed under {resumed}: "
        f"losses {apart:.1e} apart, {equal} of {len(before)} tensors equal"
    )
    assert before.keys() == after.keys() and apart < LOSSES_APART
    assert all(found[step]["lr"] == expected[step]["lr"] for step in found)
    frozen = [key for key in before if "original_expert" in key and not key.startswith("optimizer")]
    assert frozen and all(torch.equal(before[key], after[key]) for key in frozen)
