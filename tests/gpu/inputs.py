"""What the GPU tests compute with, and the command as a user would start it."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.conversion.helpers import rewrite_checkpoint
from tests.conversion.tiny_models import COMMON
from tests.emulation import start
from tests.gpu.device import EMULATED, LOCAL
from tests.training.runs import make_checkpoint

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
TIMEOUT_SECONDS = 900


def gpu_checkpoint(root: Path, model: str = "qwen2-tied") -> Path:
    """Four layers, five different experts each, every dimension a multiple of 128."""
    before = dict(COMMON)
    COMMON.update(SIZES, initializer_range=0.05)
    try:
        checkpoint = make_checkpoint(root, model, perturbed=False)
    finally:
        COMMON.update(before)
    rewrite_checkpoint(checkpoint, perturb_a_little)
    return checkpoint


def perturb_a_little(tensors: dict[str, torch.Tensor]) -> None:
    """Experts differ, but not by much: a token whose two best experts change places by rounding must not decide."""
    generator = torch.Generator().manual_seed(7)
    for key, tensor in tensors.items():
        if ".mlp.experts." in key or ".router." in key:
            size = 0.2 if ".router." in key else 0.01
            tensors[key] = tensor + size * torch.randn(tensor.shape, generator=generator)


def run_ranks(ranks: int, module: str, *arguments: object) -> str:
    """`torchrun --nproc-per-node RANKS -m MODULE ARGUMENTS...`; its output, or an AssertionError with it."""
    return run_command("torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", module, *arguments)


def run_command(module: str, *arguments: object) -> str:
    """`python -m MODULE ARGUMENTS...`; its output, or an AssertionError with it."""
    command = [sys.executable, "-m", module, *(str(argument) for argument in arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | (start.environment(not LOCAL) if EMULATED else {})
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


def gradient_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The same of all gradients as one vector."""
    assert found.keys() == expected.keys()
    return relative_error(*(torch.cat([part[key].flatten() for key in expected]) for part in (found, expected)))
